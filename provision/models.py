"""The model on a worker host: uploaded beside, verified by SHA-256, swapped in as one folder.

A version's folder never changes once it has its name; `current` is a link that one rename
moves when every worker of the host serves that version. Nothing here knows torch: a bundle is
files that a manifest pins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyinfra import host
from pyinfra.api import operation

from gpu_service import bundle
from provision import facts, operations
from provision.facts import quoted
from provision.operations import Commands, ManagedFile, fail
from provision.settings import SERVICE_STATE

ROOT = f"{SERVICE_STATE}/models"
CURRENT = "current"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle on the operator's machine, and its place on a host."""

    source: Path
    name: str
    version: str
    digest: str  # SHA-256 of the manifest, which pins every other file
    files: tuple[str, ...]

    @property
    def parent(self) -> str:
        return f"{ROOT}/{self.name}"

    @property
    def folder(self) -> str:
        return f"{self.parent}/{self.version}"

    @property
    def link(self) -> str:
        return f"{self.parent}/{CURRENT}"


def load(folder: Path) -> Model:
    """What a bundle's manifest says; `preflight.bundle_folder` has verified the rest."""
    manifest = bundle.read_manifest(folder)
    return Model(
        source=folder,
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest(folder),
        files=(*sorted(manifest.files), bundle.MANIFEST),
    )


@operation()
def upload(model: Model) -> Commands:
    """The bundle's folder on the host: every file verified there before it gets its name.

    An interrupted upload leaves a hidden partial folder, which the next run resumes. A version
    that exists with other content is refused: versions never change.
    """
    manifest = f"{model.folder}/{bundle.MANIFEST}"
    found = host.get_fact(facts.FileStates, paths=(manifest,)).get(manifest)
    if found is not None and found.sha256 == model.digest:
        return
    if found is not None:
        yield fail(
            f"{model.folder} exists with other content than {model.source}: versions never "
            "change. Give the new bundle a version of its own."
        )
        return
    partial = f"{model.parent}/.{model.version}.partial"
    files = [
        ManagedFile(path=f"{partial}/{name}", content=model.source / name) for name in model.files
    ]
    yield quoted("mkdir", "-p", "--", partial)
    yield from operations.place_files._inner(files=files, verified=True)
    yield quoted("mv", "-T", "--", partial, model.folder)
