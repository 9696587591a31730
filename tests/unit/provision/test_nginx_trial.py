"""files/nginx-trial.sh with stand-ins: names that only DNS knows, and tools that are missing.

What real namespaces and a real nginx do is in tests/deploy.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from provision import rendering

# An nginx that wants $names, and finds those that are in the hosts file.
STAND_INS = """
nginx() {
    local name
    for name in $names; do
        grep -qE " $name$" "$apart/hosts" && continue
        printf '[emerg] host not found in upstream "%s" in nginx.conf:9\\n' "$name:80/x" >&2
        return 1
    done
}
nsenter() { shift 2; "$@"; }
getent() {
    case $2 in
        auth.example) printf '%s\\n' '192.0.2.7 STREAM auth' '192.0.2.7 DGRAM' '192.0.2.8 STREAM' ;;
        other.example) printf '%s\\n' 'fe80::1%eth0 STREAM other' '2001:db8::1 STREAM' ;;
        *) return 2 ;;
    esac
}
"""


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("", []),
        ("auth.example", ["192.0.2.7 auth.example", "192.0.2.8 auth.example"]),
        (
            "auth.example other.example",
            ["192.0.2.7 auth.example", "192.0.2.8 auth.example", "2001:db8::1 other.example"],
        ),
        ("nobody.example auth.example", []),  # as nginx itself will say
    ],
)
def test_names_are_known_in_the_trials_network_as_they_are_in_the_hosts(
    tmp_path: Path, names: str, known: list[str]
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "hosts").touch()
    text = rendering.shell("nginx-trial.sh").replace("/run/gpu-gateway", str(tmp_path))
    subprocess.run(
        ["bash", "-uc", f"{text}{STAND_INS}\nnames=$1; _learn_names", "x", names], check=True
    )
    assert (tmp_path / "hosts").read_text().splitlines() == known


def test_a_tool_that_is_missing_is_named(tmp_path: Path) -> None:
    text = rendering.shell("nginx-trial.sh") + "try_candidates 8009 /etc/nginx/nginx.conf; exit $?"
    result = subprocess.run(
        ["/bin/bash", "-uc", text], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 3
    assert "the trial could not be started: ip is missing on this host; install it" in result.stderr
