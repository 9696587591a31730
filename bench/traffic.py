"""Clients that never stop while a gateway is changed: `python -m bench.traffic URL`, until its
standard input ends; then what happened to them, as one JSON object.

Three kinds: sockets that stay open and ask again and again, clients of the project's own that come
back by themselves, and connectors that do nothing but handshakes, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import sys
import urllib.parse
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from gpu_service import bundle
from gpu_service.client import Client, ClientError
from gpu_service.messages import Request
from gpu_service.protocol import encode_request

_HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
# By which a configuration that is marked says that it was it that answered.
MARK = "x-change"
_BETWEEN_REQUESTS_S = 2.0
_BETWEEN_CALLS_S = 0.02
_BETWEEN_HANDSHAKES_S = 0.01
_PATIENCE_S = 60.0


class Traffic:
    """What all clients have seen so far."""

    def __init__(self, url: str, model: Path) -> None:
        self._url = url
        self._image = bundle.load_samples(model)["image"][:1]
        self.counts: collections.Counter[str] = collections.Counter()
        self.handshakes: collections.Counter[str] = collections.Counter()  # "STATUS MARK"
        self.errors: list[str] = []
        self.ended = asyncio.Event()

    async def keep_open(self, opened: asyncio.Semaphore) -> None:
        """One socket that asks every now and then, and should never be closed."""
        frame = encode_request(Request(inputs={"image": self._image}, id="1"))
        async with opened:
            socket = await connect(self._url, open_timeout=_PATIENCE_S, ping_interval=None)
        self.counts["sockets opened"] += 1
        try:
            while not self.ended.is_set():
                self.counts["requests sent"] += 1
                await socket.send(frame)
                async with asyncio.timeout(_PATIENCE_S):
                    await socket.recv()
                self.counts["requests answered"] += 1
                await self._pause(_BETWEEN_REQUESTS_S)
            await socket.close()
        except (ConnectionClosed, TimeoutError) as error:
            self.counts["sockets closed"] += 1
            self.errors.append(f"socket: {error!r}")

    async def call(self) -> None:
        """One client that comes back by itself; every call has to be answered."""
        async with Client(self._url, deadline_s=_PATIENCE_S) as client:
            while not self.ended.is_set():
                self.counts["calls"] += 1
                try:
                    await client.infer({"image": self._image})
                except ClientError as error:
                    self.counts["calls failed"] += 1
                    self.errors.append(f"call: {error}")
                await self._pause(_BETWEEN_CALLS_S)
            self.counts["reconnects"] += client.reconnects

    async def shake_hands(self) -> None:
        """Handshakes, one after the other."""
        address = urllib.parse.urlsplit(self._url)
        while not self.ended.is_set():
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    seen = await self._handshake(address.hostname or "", address.port or 80)
            except (OSError, EOFError, TimeoutError) as error:
                seen = f"{type(error).__name__} -"
            self.handshakes[seen] += 1
            await self._pause(_BETWEEN_HANDSHAKES_S)

    async def _handshake(self, host: str, port: int) -> str:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(_HANDSHAKE)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        finally:
            writer.close()
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        return f"{head[0].split()[1]} {fields.get(MARK, '-')}"

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)


async def run(options: argparse.Namespace) -> None:
    traffic = Traffic(options.url, options.model)
    opened = asyncio.Semaphore(16)
    async with asyncio.TaskGroup() as group:
        for _ in range(options.sockets):
            group.create_task(traffic.keep_open(opened))
        for _ in range(options.clients):
            group.create_task(traffic.call())
        while traffic.counts["sockets opened"] < options.sockets:
            await asyncio.sleep(0.05)
        for _ in range(options.connectors):
            group.create_task(traffic.shake_hands())
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        traffic.ended.set()
    report = {
        "counts": traffic.counts,
        "handshakes": traffic.handshakes,
        "errors": traffic.errors[:20],
    }
    print(json.dumps(report), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sockets", type=int, default=0)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--connectors", type=int, default=0)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
