"""files/torchrun_script.sh: which address a host takes and what torchrun is told.

Commands that ask the system (`ip`, `getent`, `scontrol`, `nproc`) are stand-ins.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "files" / "torchrun_script.sh"

IP = """#!/bin/sh
case "$*" in
*"route get 10.0.0.31"*) echo "10.0.0.31 dev eth1 src 10.0.0.32 uid 0" ;;
*"route get 10.0.0.32"*) echo "local 10.0.0.32 dev lo src 10.0.0.32 uid 0" ;;
*"route get 127"*) echo "local 127.0.1.1 dev lo src 127.0.0.1 uid 0" ;;
*"scope global"*) echo "2: eth1    inet 10.0.0.32/24 brd 10.0.0.255 scope global eth1" ;;
*"to 10.0.0.32"*) echo "2: eth1    inet 10.0.0.32/24 scope global eth1" ;;
esac
"""
GETENT = """#!/bin/sh
case "$2" in
10.*) echo "$2 STREAM" ;;
host1) echo "10.0.0.31 STREAM host1" ;;
host2) echo "127.0.1.1 STREAM host2" ;;
*) exit 2 ;;
esac
"""
SCONTROL = """#!/bin/sh
case "$*" in
"show hostname host[1-2]") printf 'host1\\nhost2\\n' ;;
"show hostname far[1-2]") printf 'far1\\nfar2\\n' ;;
"--oneliner show node far1") echo "NodeName=far1 NodeAddr=10.0.0.31 NodeHostName=far1" ;;
esac
"""
PYTHON = """#!/bin/sh
printf '%s\\n' "$@" "GLOO=$GLOO_SOCKET_IFNAME" "OMP=$OMP_NUM_THREADS" \\
    "STORE=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    stand_ins = {
        "ip": IP,
        "getent": GETENT,
        "scontrol": SCONTROL,
        "nproc": "#!/bin/sh\necho 8\n",
        "fakepython": PYTHON,
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def launched(
    commands: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHON": "fakepython",
            "NPROC_PER_NODE": "2",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_another_host_takes_the_address_that_leads_to_the_first(commands: Path) -> None:
    result = launched(commands, "--epochs=3", MASTER_ADDR="10.0.0.31", NNODES="2", RDZV_ID="v1")
    told = result.stdout.splitlines()
    assert "--rdzv_endpoint=10.0.0.31:29400" in told
    assert "--rdzv_conf=is_host=0,join_timeout=300" in told
    assert "--local_addr=10.0.0.32" in told
    assert "--rdzv_id=v1" in told
    assert "--nnodes=2" in told
    assert "GLOO=eth1" in told
    assert "OMP=4" in told
    assert "STORE=1" in told
    assert told[told.index("-m", 2) : told.index("GLOO=eth1")] == [
        "-m",
        "gpu_service.training",
        "--epochs=3",
    ]


def test_the_first_host_holds_the_rendezvous(commands: Path) -> None:
    told = launched(commands, MASTER_ADDR="10.0.0.32", NNODES="2").stdout.splitlines()
    assert "--rdzv_conf=is_host=1,join_timeout=300" in told
    assert "--local_addr=10.0.0.32" in told


def test_an_elastic_run_says_how_long_it_waits_for_more_hosts(commands: Path) -> None:
    told = launched(
        commands, MASTER_ADDR="10.0.0.31", NNODES="1:2", RDZV_CONF="last_call_timeout=3"
    ).stdout.splitlines()
    assert "--nnodes=1:2" in told
    assert "--rdzv_conf=is_host=0,join_timeout=300,last_call_timeout=3" in told


def test_a_hostname_that_means_loopback_at_home_does_not_end_up_there(commands: Path) -> None:
    told = launched(commands, MASTER_ADDR="host2", NNODES="2").stdout.splitlines()
    assert "--rdzv_conf=is_host=1,join_timeout=300" in told
    assert "--local_addr=10.0.0.32" in told
    assert "GLOO=eth1" in told


@pytest.mark.parametrize(
    ("nodes", "endpoint"), [("host[1-2]", "host1:29400"), ("far[1-2]", "10.0.0.31:29400")]
)
def test_within_slurm_the_job_says_who_takes_part(
    commands: Path, nodes: str, endpoint: str
) -> None:
    """Also where no name server knows the hosts: Slurm has their addresses."""
    told = launched(
        commands, SLURM_NODELIST=nodes, SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7"
    ).stdout.splitlines()
    assert f"--rdzv_endpoint={endpoint}" in told
    assert "--nnodes=2" in told
    assert "--rdzv_id=7" in told


def test_without_slurm_or_address_it_says_what_is_missing(commands: Path) -> None:
    result = launched(commands)
    assert result.returncode == 2
    assert "MASTER_ADDR has to name the first host" in result.stderr
    unknown = launched(commands, MASTER_ADDR="nowhere")
    assert unknown.returncode == 2
    assert "cannot resolve MASTER_ADDR=nowhere" in unknown.stderr
