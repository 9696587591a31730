"""The compiled part of a release, of one small module; tests/test_compiled.py has all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import DeployError
from pyinfra.context import ctx_host, ctx_state

from provision import compiled, workers
from provision.compiled import CompilingError
from provision.facts import Hardware
from provision.settings import WorkerSettings
from provision.workers import Release
from tests.unit.provision.fleets import fleet, gateway, worker
from tests.unit.provision.test_operations import run

PYTHON, MACHINE = f"{sys.version_info.major}.{sys.version_info.minor}", os.uname().machine
THIS = Hardware(machine=MACHINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of what was compiled, which stays where it is looked for during these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "ROOT", tmp_path_factory.mktemp("root") / "compiled")
        patch.setattr(compiled, "MODULES", ("counts",))
        compiled.digest.cache_clear()
        assert compiled.find(python=PYTHON, machine=MACHINE) is None
        yield compiled.build()
    compiled.digest.cache_clear()
    workers.build_release.cache_clear()


def settings(choice: str) -> WorkerSettings:
    found = fleet(gateway(), worker(worker_compiled=choice, python=f"/usr/bin/python{PYTHON}"))
    return found.workers["gpu1"]


@pytest.fixture
def in_context() -> Iterator[None]:
    """A host that deploy code can name."""
    state = State(Inventory((["gpu1"], {})), Config())
    with ctx_state.use(state), ctx_host.use(state.inventory.get_host("gpu1")):
        yield


def test_it_is_found_for_the_same_interpreter_and_the_same_sources(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.find(python=PYTHON, machine=MACHINE) == built
    assert compiled.build() == built
    assert compiled.find(python="3.9", machine=MACHINE) is None
    assert compiled.find(python=PYTHON, machine="riscv64") is None
    monkeypatch.setattr(compiled, "digest", lambda: "0" * 16)
    assert compiled.find(python=PYTHON, machine=MACHINE) is None


def test_a_release_has_it_beside_its_sources(built: Path) -> None:
    plain, with_it = workers.build_release(), workers.build_release(built)
    assert not plain.compiled
    assert with_it.compiled
    assert plain.digest != with_it.digest
    workers.build_release.cache_clear()
    assert workers.build_release(built) == with_it


@pytest.mark.usefixtures("in_context")
def test_which_release_a_host_gets(built: Path) -> None:
    assert workers.choose_release(settings("no"), THIS) == workers.build_release()
    for choice in ("auto", "yes"):
        assert workers.choose_release(settings(choice), THIS) == workers.build_release(built)
    other = Hardware(machine="riscv64")
    assert workers.choose_release(settings("auto"), other) == workers.build_release()
    with pytest.raises(DeployError, match=r"gpu1: worker_compiled: .* on riscv64; on a machine"):
        workers.choose_release(settings("yes"), other)


@pytest.mark.usefixtures("in_context", "built")
def test_a_deploy_of_sources_that_changed_since_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workers._warn_of_sources.cache_clear()
    workers.choose_release(settings("auto"), THIS)
    workers.choose_release(settings("auto"), Hardware(machine="riscv64"))
    assert caplog.messages == []  # what is there serves; and nobody ever compiled for the other
    monkeypatch.setattr(compiled, "digest", lambda: "0" * 16)
    workers.choose_release(settings("no"), THIS)
    assert caplog.messages == []
    for _ in range(2):  # hosts
        assert workers.choose_release(settings("auto"), THIS) == workers.build_release()
    (said,) = caplog.messages
    assert "the sources have changed since they were compiled" in said
    assert ".venv/bin/python -m provision.compiled" in said


@pytest.mark.usefixtures("in_context")
def test_without_the_compiler_the_sources_are_deployed(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.find(python=PYTHON, machine=MACHINE) == built
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    assert workers.choose_release(settings("auto"), THIS) == workers.build_release()
    with pytest.raises(DeployError, match=r"gpu1: worker_compiled: .* mypy, which is not"):
        workers.choose_release(settings("yes"), THIS)
    with pytest.raises(CompilingError, match=r"missing here: mypy"):
        compiled.build()


def installed(release: Release, place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The folder of a release that the operation's own command unpacked here; and what it said."""
    monkeypatch.setattr(workers, "OPT", str(place))
    (place / "releases").mkdir()
    (command,) = [
        command
        for command in run(workers.install_release, {}, release=release, python=sys.executable)
        if "tar -xzf" in command
    ]
    (place / "releases" / f".{release.digest}.tar.gz").write_bytes(release.archive)
    done = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    assert [path.name for path in (place / "releases").iterdir()] == [release.digest]
    return place / "releases" / release.digest / "gpu_service", done.stderr


def test_what_loads_on_the_host_stays(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, said = installed(workers.build_release(built), tmp_path, monkeypatch)
    assert said == ""
    assert {path.name for path in package.glob("*.so")} == {path.name for path in built.iterdir()}


def test_what_does_not_load_on_the_host_is_left_out(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / built.name
    broken.mkdir()
    for path in built.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:500])
    release = workers.build_release(broken)
    package, said = installed(release, tmp_path, monkeypatch)
    assert "the compiled part does not load here" in said
    assert list(package.glob("*.so")) == []
    assert (package / "counts.py").exists()


def test_what_a_compiler_needs_is_named(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "digest", lambda: "0" * 16)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(CompilingError, match=r"a C compiler \(gcc\), Python's headers"):
        compiled.build()
    monkeypatch.setattr(sys, "argv", ["compiled", "--if-possible"])
    assert compiled.main() == 0
    monkeypatch.setattr(sys, "argv", ["compiled"])
    assert compiled.main() == 1


def test_a_failed_compilation_leaves_what_was_there(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "digest", lambda: "0" * 16)
    monkeypatch.setattr(compiled, "_COMPILE", "raise SystemExit('no such thing')")
    with pytest.raises(CompilingError, match="no such thing"):
        compiled.build()
    assert [path.name for path in compiled.ROOT.iterdir()] == [built.name]


def test_what_was_made_of_other_sources_goes_once_its_successor_is_there(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last test here: what the others look at goes with it.
    older = built.with_name(built.name.replace(built.name.rpartition("-")[2], "0" * 16))
    older.mkdir()
    monkeypatch.setattr(compiled, "digest", lambda: "1" * 16)
    monkeypatch.setattr(compiled, "_compile", lambda folder: (folder / "done").mkdir())
    newest = compiled.build()
    assert newest.name.endswith("1" * 16)
    assert list(compiled.ROOT.iterdir()) == [newest]
