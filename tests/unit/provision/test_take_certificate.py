"""files/take-certificate.sh with stand-ins for nginx, openssl and systemd: what it says when it
goes back. What real ones do is in tests/deploy/test_tls.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from provision import rendering

# A certificate is its own fingerprint and every key fits; $served is what the port shows.
OPENSSL = """#!/bin/sh
case "$*" in
    s_client*) cat "$served" ;;
    *-pubkey* | *-pubout*) echo key ;;
    *-fingerprint*) cat ;;
    *-enddate*) echo notAfter=later ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
case $1 in
    is-active) echo active ;;
    reload) [ "$1" != "$broken" ] && cp "$certificate" "$served" ;;
esac
"""
NGINX = '#!/bin/sh\n[ "$broken" != nginx ]\n'
MV = '#!/bin/sh\n[ "$broken" != mv ] && exec {} "$@"\n'


def taken(folder: Path, broken: str) -> tuple[int, str]:
    """How the script ends, and what it says, where something does not work."""
    tools = folder / "bin"
    tools.mkdir()
    programs = {"openssl": OPENSSL, "systemctl": SYSTEMCTL, "nginx": NGINX}
    for name, text in (programs | {"mv": MV.format(shutil.which("mv"))}).items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "sleep").symlink_to("/bin/true")
    for name in ("fullchain.pem", "privkey.pem"):
        (folder / name).write_text("new\n")
    for name in ("live.pem", "live.key", "served"):
        (folder / name).write_text("old\n")
    text = rendering.shell("take-certificate.sh").replace("/run/gpu-gateway", str(folder))
    result = subprocess.run(
        ["bash", "-c", text, "x", folder, folder / "live.pem", folder / "live.key", "1", "name"],
        env={
            "PATH": f"{tools}:{os.environ['PATH']}",
            "served": str(folder / "served"),
            "certificate": str(folder / "live.pem"),
            "broken": broken,
        },
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stderr


def test_a_new_one_is_taken(tmp_path: Path) -> None:
    code, said = taken(tmp_path, "")
    assert (code, (tmp_path / "served").read_text()) == (0, "new\n")
    assert "is new: it ends on later" in said


@pytest.mark.parametrize(
    ("broken", "end"),
    [
        ("nginx", "the certificate before is back, and nginx serves on"),
        ("reload", "is back in its place, but port 1 does not show it; see: tail "),
        ("mv", "the certificate before could not be put back: move "),
    ],
)
def test_what_is_said_to_be_back_is_back(tmp_path: Path, broken: str, end: str) -> None:
    code, said = taken(tmp_path, broken)
    assert code == 1
    assert end in said
    assert ("nginx serves on" in said) is (broken == "nginx")
    assert (tmp_path / "live.pem").read_text() == "old\n"
