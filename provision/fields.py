"""Types that settings are made of: each refuses what could break a file or a command. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A set of settings: checked, frozen, and with no name that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Seconds = Annotated[int, Field(strict=True, ge=1, le=30 * 24 * 3600)]
Metric = Annotated[float, Field(allow_inf_nan=False)]
# Names that end up in a configuration file, a path or a command line: no blanks, no quotes,
# no semicolons, whatever quoting the place uses.
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
# A full name, as certificates are for. None of its labels begins or ends with a hyphen.
HOST_NAME = r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*$"
AbsolutePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./-]+$")]
Origin = Annotated[str, Field(pattern=r"^https?://(\*\.)?[a-z0-9][a-z0-9.-]*(:[0-9]{1,5})?$")]

PER_GPU = "per-gpu"
WorkerPorts = Annotated[tuple[Port, ...], Field(min_length=1, max_length=64)] | Literal["per-gpu"]
