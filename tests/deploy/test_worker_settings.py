"""What an operator may give workers beside the model: tokens, packages; and how one is followed
through the logs of both hosts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from provision.wheelhouse import Target, build
from tests.deploy.conftest import Deployment
from tests.deploy.test_deploy import UNITS, drift, main_pids, wait_for

TOKENS = "/etc/gpu-service/tokens"


def status_of(deployment: Deployment, *, token: str = "") -> int:
    """Of a handshake through the gateway."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with connect(deployment.gateway_url, additional_headers=headers, proxy=None):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def line_of(token: str) -> str:
    return f"{hashlib.sha256(token.encode()).hexdigest()} operator\n"


def test_only_who_has_a_token_connects_and_other_tokens_restart_nothing(
    deployment: Deployment, tmp_path: Path
) -> None:
    listed = tmp_path / "tokens"
    listed.touch(mode=0o600)
    listed.write_text(line_of("first"))
    result = deployment.run(worker_tokens=str(listed))
    assert result.returncode == 0, result.output
    assert "verified: the worker on port 9005 is ready" in result.output
    assert "answers a WebSocket handshake with 401" in result.output
    found = deployment.on("gpu1", "stat", "-c", "%a %U %G", TOKENS).strip()
    assert found == "640 root gpu-service"
    assert status_of(deployment) == 401
    assert status_of(deployment, token="first") == 101

    pids = main_pids(deployment)
    listed.write_text(line_of("second"))
    told = drift(deployment, worker_tokens=str(listed))
    assert told.returncode == 2, told.stderr
    assert f"{TOKENS}: differs (its content is not shown)" in told.stdout
    assert line_of("second").split()[0] not in told.stdout + told.stderr
    changed = deployment.run(worker_tokens=str(listed))
    assert changed.returncode == 0, changed.output
    assert changed.changed == {"gpu1": ["Worker | Tokens that may connect"]}
    assert main_pids(deployment) == pids
    wait_for(lambda: status_of(deployment, token="first") == 401, what="the old token is out")
    assert status_of(deployment, token="second") == 101
    assert deployment.run().returncode == 0
    assert status_of(deployment) == 101


def make_wheel(folder: Path, *, answer: int) -> Path:
    """A package as a user's build would give it; pip asks for no more than this."""
    files = {
        "mine.py": f"ANSWER = {answer}\n",
        "mine-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n",
        "mine-1.0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(
        f"{name},sha256={_urlsafe_sha256(content)},{len(content)}\n"
        for name, content in files.items()
    )
    wheel = folder / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("mine-1.0.dist-info/RECORD", f"{record}mine-1.0.dist-info/RECORD,,\n")
    return wheel


def _urlsafe_sha256(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@pytest.fixture
def own_wheel(tmp_path: Path) -> Iterator[Path]:
    """A wheel, and the wheelhouse that `python -m provision.wheelhouse` makes with it."""
    wheel = make_wheel(tmp_path, answer=42)
    target = Target(build="cpu", python="3.11", machine="x86_64", packages=(str(wheel),))
    build(target)
    yield wheel
    shutil.rmtree(target.folder)


def test_packages_of_ones_own_are_in_the_workers_environment(
    deployment: Deployment, own_wheel: Path
) -> None:
    result = deployment.run(worker_packages=[str(own_wheel)])
    assert result.returncode == 0, result.output
    assert any("Virtual environment" in name for name in result.changed["gpu1"])
    settings = deployment.on("gpu1", "cat", "/etc/gpu-service/worker-9005.env")
    python = re.search(r"GPU_WORKER_PYTHON=(\S+)", settings)
    assert python is not None
    code = "import mine, torch; print(mine.ANSWER)"
    assert deployment.on("gpu1", python[1], "-P", "-c", code) == "42\n"
    assert deployment.run(worker_packages=[str(own_wheel)]).changed == {}
    back = deployment.run()
    assert back.returncode == 0, back.output
    assert not any("Virtual environment" in name for name in back.changed["gpu1"])


def test_a_reload_of_the_unit_reads_the_models_anew(deployment: Deployment) -> None:
    pids = main_pids(deployment)
    for unit in UNITS:
        deployment.on("gpu1", "systemctl", "reload", unit)
    assert main_pids(deployment) == pids


def test_one_id_names_a_connection_in_the_logs_of_both_hosts(deployment: Deployment) -> None:
    def events_of_the_last_connection() -> set[str]:
        with connect(deployment.gateway_url, proxy=None):
            pass
        access = deployment.on("gw1", "tail", "-n", "1", "/var/log/nginx/access.log")
        request_id = re.search(r"id=([0-9a-f]{32})$", access.strip())
        assert request_id is not None, access
        journal = deployment.on("gpu1", "journalctl", "-u", "gpu-worker@*", "-n", "50", "-o", "cat")
        events = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
        return {event["event"] for event in events if event.get("request_id") == request_id[1]}

    # More than once: nginx and the worker write their lines when they have seen the close.
    wait_for(
        lambda: {"connection_opened", "connection_closed"} <= events_of_the_last_connection(),
        what="the worker's log has the id of nginx's",
    )
