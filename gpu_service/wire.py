"""The JSON of messages as it is on the wire, checked for its types while it is decoded.

`protocol` alone reads it. Pure.
"""

from typing import Annotated

import msgspec

from gpu_service.messages import Scalar, SessionInfo

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


# A request with a field that nobody reads is a misspelt one: refused. Replies are read
# leniently, so that a newer server may add fields.
class Tensor(msgspec.Struct):
    name: str
    shape: list[Size]
    datatype: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: dict[str, Scalar] = {}


class StrictTensor(Tensor, forbid_unknown_fields=True):
    pass


class OutputName(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class Cancel(msgspec.Struct, forbid_unknown_fields=True):
    id: str | None = None
    sequence_id: str | int | None = None


class Request(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[StrictTensor] | None = None
    cancel: Cancel | None = None
    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    outputs: list[OutputName] | None = None
    parameters: dict[str, Scalar] = {}


class Error(msgspec.Struct):
    code: str
    message: str
    retry_after_ms: int | None = None


class Reply(msgspec.Struct):
    id: str | None = None
    session: SessionInfo | None = None
    error: Error | None = None
    model_name: str = ""
    model_version: str = ""
    outputs: list[Tensor] = []
    parameters: dict[str, Scalar] = {}


class JustId(msgspec.Struct):
    id: str | None = None


REQUEST_DECODER = msgspec.json.Decoder(Request)
REPLY_DECODER = msgspec.json.Decoder(Reply)
ID_DECODER = msgspec.json.Decoder(JustId)
