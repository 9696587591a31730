"""files/nginx-activate.sh with stand-ins for nginx and systemd: what is left when something fails.

What real ones do is in tests/deploy.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from provision import rendering

OLD, NEW = "listen 8009 default_server;\n", "listen 8010 default_server;\n"

# $taken: what nginx takes over at a reload; $up: whether it runs; $served: places that answer.
STAND_INS = """
systemctl() {
    echo "systemctl $*" >&2
    case $1 in is-active | start) [[ $up == yes ]] ;; esac
}
journalctl() { :; }
nginx() { echo "nginx version: nginx/1.22.1"; }
try_candidates() { printf '%s' "$trial_lost"; return "$trial"; }
sleep() { :; }
handshake_status() { [[ ,$served, != *",$1,"* ]] || echo "HTTP/1.1 101 x"; }
accepting() { echo "${1-}"; }
took_over() { grep -qxF -e "${taken%$'\\n'}" "$conf"; }
binary_changed() { [[ $binary == changed ]]; }
master() { echo 7; }
release_former_master() { :; }
kill() { echo "kill $*" >&2; }
soon() { :; }
"""


def activated(
    folder: Path,
    *,
    taken: str = NEW,
    up: bool = True,
    served: str = "",
    binary: str = "same",
    trial: int = 0,
) -> tuple[int, str]:
    """How it ends, and what it says, where nginx.conf is to become NEW."""
    conf = folder / "nginx.conf"
    conf.write_text(OLD)
    (folder / ".nginx.conf.candidate").write_text(NEW)
    text = "".join(
        rendering.shell(part) for part in ("handshake.sh", "nginx-trial.sh", "nginx-activate.sh")
    )
    begin = text.index('mkdir -p "$apart"\nexec 8>')
    text = text[:begin] + STAND_INS + text[begin:]
    for path, here in (
        ("/var/lib/gpu-gateway", folder / "state"),
        ("/run/gpu-gateway", folder / "run"),
        ("/etc/nginx/nginx.conf", conf),
    ):
        text = text.replace(path, str(here))
    (folder / "state").mkdir(exist_ok=True)
    digest = hashlib.sha256(NEW.encode()).hexdigest()
    said = {
        "taken": taken,
        "up": "yes" if up else "no",
        "served": served,
        "binary": binary,
        "trial": str(trial),
        "trial_lost": "",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    result = subprocess.run(
        ["bash", "-c", text, "nginx-activate", "8010", "digest", digest, conf],
        env=said,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stderr


def test_what_nginx_takes_and_clients_get_is_noted(tmp_path: Path) -> None:
    code, said = activated(tmp_path, served="8009,8010")
    assert code == 0, said
    assert (tmp_path / "nginx.conf").read_text() == NEW
    assert (tmp_path / "state/applied").read_text() == "digest\n"
    assert (tmp_path / f"state/previous{tmp_path}/nginx.conf").read_text() == OLD


def test_what_serves_nobody_where_somebody_was_served_is_taken_back(tmp_path: Path) -> None:
    code, said = activated(tmp_path, served="8009")
    assert code == 1
    assert (tmp_path / "nginx.conf").read_text() == OLD
    assert "port 8010 does not answer a WebSocket handshake" in said


def test_where_nobody_was_served_it_is_not_to_blame(tmp_path: Path) -> None:
    code, said = activated(tmp_path)
    assert code == 0, said
    assert (tmp_path / "nginx.conf").read_text() == NEW


@pytest.mark.parametrize("served", ["", "8009"])
@pytest.mark.parametrize("binary", ["same", "changed"])
def test_what_a_running_nginx_does_not_take_is_taken_back(
    tmp_path: Path, served: str, binary: str
) -> None:
    """Also where nobody was served before, as at a first deploy whose workers are down."""
    code, said = activated(tmp_path, taken=OLD, served=served, binary=binary)
    assert code == 1
    assert (tmp_path / "nginx.conf").read_text() == OLD
    assert "the previous configuration is back" in said
    assert ("clients were not served either" in said) is (served == "")
    assert ("the binary that ran before runs again" in said) is (binary == "changed")
    assert not list(tmp_path.glob(".nginx.conf.*"))


def test_where_nginx_did_not_run_there_is_nothing_to_take_back(tmp_path: Path) -> None:
    code, said = activated(tmp_path, up=False)
    assert code == 1
    assert "nginx does not start" in said
    assert (tmp_path / "nginx.conf").read_text() == NEW
