"""Sockets that stay open while the gateway is changed, rightly and wrongly: none is closed, no
request is lost, and nobody is ever answered by a configuration that was refused.
"""

from __future__ import annotations

import asyncio
import collections
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from websockets.asyncio.client import ClientConnection, connect

from gpu_service import bundle
from gpu_service.messages import Request
from gpu_service.protocol import encode_request
from tests.deploy.conftest import CHECKOUT, Deployment, Run
from tests.deploy.test_deploy import ready_through, wait_for
from tests.deploy.test_sockets import Connects

SOCKETS = 30
CONF = "/etc/nginx/nginx.conf"
FOREIGN = "/etc/nginx/default.d/foreign.conf"


class LongLived:
    """Sockets that each ask again and again; a closed one or an unanswered request is an error."""

    def __init__(self, deployment: Deployment) -> None:
        self._url = deployment.gateway_url
        image = bundle.load_samples(deployment.model)["image"][:1]
        self._frame = encode_request(Request(inputs={"image": image}, id="1"))
        self.answers: collections.Counter[int] = collections.Counter()

    async def _ask_on(self, number: int, socket: ClientConnection) -> None:
        while not self._ended.is_set():
            await socket.send(self._frame)
            await socket.recv()
            self.answers[number] += 1
            await asyncio.sleep(0.2)  # between two requests

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self._ended = asyncio.Event()
        sockets = [await connect(self._url) for _ in range(SOCKETS)]
        try:
            async with asyncio.TaskGroup() as group:
                for number, socket in enumerate(sockets):
                    group.create_task(self._ask_on(number, socket))
                yield
                self._ended.set()
        finally:
            for socket in sockets:
                await socket.close()

    async def all_answered_again(self) -> None:
        before = dict(self.answers)
        async with asyncio.timeout(60):
            while any(self.answers[n] <= before.get(n, 0) for n in range(SOCKETS)):
                await asyncio.sleep(0.05)  # between two looks; the condition decides


def on_gateway(deployment: Deployment, script: str) -> str:
    return deployment.on("gw1", "sh", "-c", script)


@contextmanager
def full(deployment: Deployment, folder: str) -> Iterator[None]:
    """A file system of its own for a folder, with its content and without any room left."""
    on_gateway(
        deployment,
        f"set -e; rm -f {folder}/.*.candidate; cp -a {folder} /run/kept; "
        "size=$(du -sk /run/kept | cut -f 1); "
        f"mount -t tmpfs -o size=$((size + 128))k tmpfs {folder}; cp -a /run/kept/. {folder}; "
        f"cat /dev/zero >{folder}/filler 2>/dev/null || rm -rf /run/kept",
    )
    try:
        yield
    finally:
        on_gateway(deployment, f"umount {folder}")


def mismatched(deployment: Deployment) -> dict[str, object]:
    """A certificate, and the key of another one."""
    on_gateway(
        deployment,
        "cd /root && for n in a b; do openssl req -x509 -newkey rsa:2048 -nodes -days 2 "
        "-subj /CN=$n -keyout $n.key -out $n.pem 2>/dev/null; done; "
        "mkdir -p /etc/pki/wrong && mv a.pem b.key /etc/pki/wrong",
    )
    folder = "/etc/pki/wrong"
    return {"tls_certificate": f"{folder}/a.pem", "tls_certificate_key": f"{folder}/b.key"}


async def test_changes_right_and_wrong_cost_no_socket_no_request_and_no_handshake(
    deployment: Deployment,
) -> None:
    ready = await asyncio.to_thread(deployment.run)
    assert ready.returncode == 0, ready.output
    certificates = mismatched(deployment)
    sockets, prober = LongLived(deployment), Connects(deployment.gateway_url)

    async def run(**data: object) -> Run:
        before = deployment.on("gw1", "sha256sum", CONF)
        result = await asyncio.to_thread(deployment.run, **data)
        await sockets.all_answered_again()
        if result.returncode:
            assert deployment.on("gw1", "sha256sum", CONF) == before
            assert deployment.on("gw1", "sh", "-c", "ls -A /etc/nginx | grep outgoing; true") == ""
        return result

    async with sockets.open(), prober.running():
        right = await run(keepalive_timeout_s=61)
        assert right.returncode == 0, right.output
        assert f"with {SOCKETS} sockets of clients; they stay until they close" in right.output

        wrong = await run(**certificates)
        assert wrong.returncode != 0
        told = "/etc/pki/wrong/b.key is not the key of /etc/pki/wrong/a.pem"
        assert told in wrong.output, wrong.output

        for folder in ("/etc/nginx", "/var/lib/gpu-gateway"):
            with full(deployment, folder):
                wrong = await run(keepalive_timeout_s=62)
            assert wrong.returncode != 0, folder
            assert "Traceback" not in wrong.output, folder

        # Of somebody else, not loaded yet: every request would be refused after a reload.
        on_gateway(deployment, f"echo 'return 418;' >{FOREIGN}")
        wrong = await run(keepalive_timeout_s=63)
        assert "port 8009 would not answer a WebSocket handshake" in wrong.output
        assert "tried beside the live configuration, which is as it was" in wrong.output

        # The same, and whoever asked for it is gone, at the moment in which it is tried.
        cut = await asyncio.to_thread(killed_while_activating, deployment)
        assert cut == -signal.SIGKILL
        await asyncio.to_thread(
            wait_for, lambda: not activating(deployment), what="the activation has ended"
        )
        await sockets.all_answered_again()
        assert "keepalive_timeout 61;" in deployment.on("gw1", "cat", CONF)
        on_gateway(deployment, f"rm {FOREIGN}")

        right = await run(worker_shutdown_timeout_s=3600)
        assert right.returncode == 0, right.output
        assert "they are cut 3600 s after their reload" in right.output
    assert set(prober.heads) == {"101"}


def activating(deployment: Deployment) -> bool:
    return "nginx-activate" in deployment.on("gw1", "pgrep", "-x", "bash", "-a", check=False)


def killed_while_activating(deployment: Deployment) -> int:
    """A deploy that is killed as soon as the gateway is at work on it; how it ended."""
    process = subprocess.Popen(
        deployment.command("-y", keepalive_timeout_s=64),
        cwd=CHECKOUT,
        env=deployment.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: activating(deployment), what="the gateway is at work")
    process.kill()
    return process.wait(timeout=10)


def test_a_file_that_is_no_longer_declared_goes_and_a_rollback_brings_it_back(
    deployment: Deployment,
) -> None:
    old, foreign = "/etc/nginx/conf.d/ours-once.conf", "/etc/nginx/conf.d/theirs.conf"
    on_gateway(
        deployment,
        f"echo '# ours' >{old}; echo '# theirs' >{foreign}; "
        f"echo {old} >>/var/lib/gpu-gateway/managed",
    )
    try:
        result = deployment.run(keepalive_timeout_s=58)
        assert result.returncode == 0, result.output
        assert f"no longer declared, so it goes: {old}" in result.output
        assert f"read by nginx, not managed here, left alone: {foreign}" in result.output
        assert deployment.on("gw1", "ls", "/etc/nginx/conf.d").split() == ["theirs.conf"]
        back = deployment.run(deploy="rollback.py", rollback="gateways")
        assert back.returncode == 0, back.output
        assert deployment.on("gw1", "cat", old) == "# ours\n"
    finally:
        on_gateway(deployment, f"rm -f {foreign}")
    assert deployment.run().returncode == 0
    assert deployment.on("gw1", "ls", "/etc/nginx/conf.d") == ""


def test_two_deploys_to_one_gateway_do_not_interleave(deployment: Deployment) -> None:
    """The second waits for the first, which here is anybody who holds the lock."""
    holder = deployment.hosts["gw1"]["ssh_config_file"]
    lock = "flock /run/gpu-gateway/lock sh -c 'echo held; read line'"
    with subprocess.Popen(
        ["ssh", "-F", holder, "gw1", "--", lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = subprocess.Popen(
            deployment.command("-y", keepalive_timeout_s=57),
            cwd=CHECKOUT,
            env=deployment.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(lambda: activating(deployment), what="the second deploy waits")
        assert "keepalive_timeout 57" not in deployment.on("gw1", "cat", CONF)
        # Somebody stages another one meanwhile: neither is taken for the other.
        on_gateway(deployment, "echo '# another' >/etc/nginx/.nginx.conf.candidate")
        first.stdin.write("\n")
        first.stdin.flush()
        output = second.communicate(timeout=120)[0]
    assert second.returncode != 0
    assert "another deploy is at work on this host; nothing was touched" in output
    assert ready_through(deployment)
    again = deployment.run()
    assert again.returncode == 0, again.output
