"""files/worker-switch.sh: which settings a worker has when runs overlap or are killed.

`systemctl` and `journalctl` are stand-ins: a worker that is told bad settings does not get ready.
What systemd makes of it is in tests/deploy.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from provision import rendering

UNIT = "gpu-worker@9005.service"

# The "process" is a folder of /proc, which the script finds in $ROOT. Bad settings fail as soon as
# $ROOT/go is there, as a worker does when its time to get ready is over.
SYSTEMCTL = """#!/bin/bash
process=$ROOT/proc/7
case "$*" in
"is-active --quiet $UNIT") [[ -e $process/environ ]] ;;
is-active*|is-enabled*) exit 1 ;;
"show $UNIT -p MainPID --value") echo 7 ;;
"restart $UNIT")
    rm -rf "$process"
    if grep -q bad "$ROOT/settings"; then
        until [[ -e $ROOT/go ]]; do sleep 0.05; done
        exit 1
    fi
    mkdir -p "$process" && tr '\\n' '\\0' <"$ROOT/settings" >"$process/environ"
    echo "$(cat "$ROOT/settings")" >>"$ROOT/started" ;;
esac
"""


class Host:
    """A folder with the worker's settings, and what it runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", "#!/bin/sh\n")):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        (root / "run").mkdir()
        script = rendering.shell("worker-switch.sh")
        assert "/run/" in script
        assert "/proc/" in script
        self.script = script.replace("/run/", f"{root}/run/").replace("/proc/", f"{root}/proc/")

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", self.script, "worker-switch", *arguments],
            env={
                "PATH": f"{self.root}/bin:{os.environ['PATH']}",
                "ROOT": str(self.root),
                "UNIT": UNIT,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def deploy(self, name: str) -> subprocess.Popen[str]:
        """A run that declares settings of this name."""
        return self.begin(*self.declared(name))

    def declared(self, name: str) -> tuple[str, str, str, str]:
        content = settings(name).encode()
        candidate = self.root / ".settings.candidate"
        candidate.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        return UNIT, str(self.root / "settings"), str(candidate), digest

    def back(self) -> int:
        return ended(self.begin("--previous", UNIT, str(self.root / "settings")))[0]

    def has(self, suffix: str = "") -> str | None:
        """Which settings there are."""
        path = self.root / f"settings{suffix}"
        return path.read_text().strip().rpartition("=")[2] if path.exists() else None

    @property
    def runs(self) -> str | None:
        environ = self.root / "proc" / "7" / "environ"
        return environ.read_text().strip("\0").rpartition("=")[2] if environ.exists() else None


def settings(name: str) -> str:
    return f"GPU_SERVICE_DEPLOYMENT={name}\n"


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    said = run.communicate(timeout=30)[1]
    return run.returncode, said


@pytest.fixture
def host(tmp_path: Path) -> Host:
    found = Host(tmp_path)
    assert ended(found.deploy("first")) == (0, "")
    assert (found.has(), found.runs, found.has(".rollback")) == ("first", "first", None)
    return found


def until_restarting(host: Host) -> None:
    deadline = time.monotonic() + 30
    while host.runs is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_ran_before_is_what_a_rollback_goes_to_and_forward_again(host: Host) -> None:
    assert ended(host.deploy("second")) == (0, "")
    assert (host.has(), host.runs, host.has(".rollback")) == ("second", "second", "first")
    assert host.has(".previous") is None
    assert host.back() == 0
    assert (host.runs, host.has(".rollback")) == ("first", "second")
    assert host.back() == 0
    assert (host.runs, host.has(".rollback")) == ("second", "first")


def test_settings_with_which_a_worker_does_not_get_ready_go_again(host: Host) -> None:
    (host.root / "go").touch()
    status, said = ended(host.deploy("bad"))
    assert status == 1
    assert f"{UNIT} serves again what it served before" in said
    assert (host.has(), host.runs, host.has(".previous")) == ("first", "first", None)


def test_a_deploy_that_mends_one_that_is_failing_ends_with_its_own_settings(host: Host) -> None:
    """The operator ended the first run, whose restart goes on here, and deployed again."""
    failing = host.deploy("bad")
    until_restarting(host)
    mended = host.deploy("mended")
    time.sleep(0.3)
    assert host.has(".previous") == "first"
    (host.root / "go").touch()
    assert ended(failing)[0] == 1
    assert ended(mended) == (0, "")
    assert (host.has(), host.runs, host.has(".rollback")) == ("mended", "mended", "first")


def test_the_same_settings_again_fail_again(host: Host) -> None:
    """What came back meanwhile is not what was declared."""
    failing = host.deploy("bad")
    until_restarting(host)
    again = host.deploy("bad")
    time.sleep(0.3)
    (host.root / "go").touch()
    assert [ended(failing)[0], ended(again)[0]] == [1, 1]
    assert (host.has(), host.runs) == ("first", "first")


def test_a_deploy_that_takes_a_failing_one_back_has_nothing_left_to_do(host: Host) -> None:
    failing = host.deploy("bad")
    until_restarting(host)
    back = host.deploy("first")
    time.sleep(0.3)
    (host.root / "go").touch()
    assert ended(failing)[0] == 1
    assert ended(back) == (0, "")
    assert (host.has(), host.runs, host.has(".rollback")) == ("first", "first", None)
    assert (host.root / "started").read_text() == settings("first") * 2


def killed(host: Host) -> None:
    """As by a host that lost power between the swap and the end."""
    (host.root / "settings").rename(host.root / "settings.previous")
    (host.root / "settings").write_text(settings("bad"))
    (host.root / "proc" / "7" / "environ").unlink()


def test_after_a_run_that_was_killed_what_ran_before_it_is_still_there(host: Host) -> None:
    killed(host)
    assert ended(host.deploy("mended")) == (0, "")
    assert (host.has(), host.runs, host.has(".rollback")) == ("mended", "mended", "first")
    killed(host)
    assert host.back() == 0
    assert (host.has(), host.runs, host.has(".rollback")) == ("mended", "mended", "bad")


def test_a_worker_that_came_up_with_the_settings_of_a_killed_run_goes_back_to_them(
    host: Host,
) -> None:
    (host.root / "settings.previous").write_text(settings("older"))
    assert ended(host.deploy("second")) == (0, "")
    assert host.has(".rollback") == "first"


def test_what_another_deploy_put_there_is_not_taken_for_ones_own(host: Host) -> None:
    own = host.declared("second")
    host.declared("another")
    status, said = ended(host.begin(*own))
    assert status == 1
    assert "is not what was sent" in said
    assert (host.has(), host.runs) == ("first", "first")
