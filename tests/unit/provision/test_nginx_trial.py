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


# A master that acts on the request for another binary only when it is asked for the second time, as
# nginx does that was asked before it waited for signals.
MASTER = """
pid=$1/nginx.pid asked=0 ended=''
move() {
    ((++asked > 1)) || return 0
    mv "$pid" "$pid.oldbin"
    if [[ $2 == ends ]]; then
        mv "$pid.oldbin" "$pid"
    else
        echo 1 >"$pid"
    fi
}
trap 'move "$@"' USR2
trap 'rm -f "$pid.oldbin"; ended=1' TERM
echo $$ >"$pid"
while [[ -z $ended ]]; do sleep 0.01; done
"""


def enter_the_hosts_network(folder: Path, new_binary: str) -> subprocess.CompletedProcess[str]:
    text = rendering.shell("nginx-trial.sh").replace("/run/gpu-gateway", str(folder))
    master = subprocess.Popen(["bash", "-uc", MASTER, "master", str(folder), new_binary])
    try:
        # Until its pid is there, nobody could ask.
        wait = "until [[ -s $apart/nginx.pid ]]; do :; done; _enter_the_hosts_network"
        return subprocess.run(
            ["bash", "-uc", f"{text}\n{wait}"], capture_output=True, text=True, timeout=60
        )
    finally:
        master.terminate()
        master.wait(timeout=10)


def test_a_master_that_did_not_hear_is_asked_again(tmp_path: Path) -> None:
    result = enter_the_hosts_network(tmp_path, "lives")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "nginx.pid").read_text() == "1\n"
    assert not (tmp_path / "nginx.pid.oldbin").exists()


def test_a_master_that_took_its_place_back_does_not_serve(tmp_path: Path) -> None:
    result = enter_the_hosts_network(tmp_path, "ends")
    assert result.returncode == 1
    assert result.stderr == "nginx could not be started beside the live one\n"


def test_an_nginx_that_did_not_say_its_number_does_not_serve(tmp_path: Path) -> None:
    (tmp_path / "nginx.pid").touch()  # by `nginx -t`
    text = rendering.shell("nginx-trial.sh").replace("/run/gpu-gateway", str(tmp_path))
    result = subprocess.run(
        ["bash", "-uc", f"{text}\n_enter_the_hosts_network"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr == "nginx could not be started beside the live one\n"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("[notice] a\n[warn] b\n[error] refused\n[error] no live upstreams\n", "[error] refused\n"),
        ("[notice] a\n[error] no live upstreams\n", "[error] no live upstreams\n"),
        ("[notice] a\n", ""),
    ],
)
def test_what_failed_first_is_said(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/error.log").write_text(log)
    text = rendering.shell("nginx-trial.sh").replace("/run/gpu-gateway", str(tmp_path))
    result = subprocess.run(["bash", "-uc", f"{text}\n_why"], capture_output=True, text=True)
    assert result.stdout == said
