"""One client's connection: reads requests, writes replies, bounds both.

Owns the connection's two tasks (the handler reads, another writes) and everything that its
client has not been answered yet. All on the event loop. What is bounded: messages taken and
not answered, answered meaning that the reply went through flow control. A client that does
not read its replies is therefore not read either, until the keepalive closes it.
"""

import asyncio
import collections
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from gpu_service.batching import Ticket
from gpu_service.service import InFlight, Service


class Connection(ServerConnection):
    """websockets' connection, which also says when it is lost.

    A handler that waits for the device would notice only later, and the device would work for
    nobody.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_lost: Callable[[], None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None  # it refers back to this object


class Session:
    """Serves one open connection; a `service.Caller`."""

    def __init__(self, connection: Connection, *, service: Service, max_in_flight: int) -> None:
        self._connection = connection
        self._service = service
        self._max_in_flight = max_in_flight
        self._unanswered = 0  # messages taken whose reply is not written yet
        self._tickets: set[Ticket[InFlight]] = set()  # those of them that wait for the device
        self._ids: set[str] = set()
        self._outbox: collections.deque[tuple[bytes, bool]] = collections.deque()
        self._mail = asyncio.Event()  # something is in the outbox
        self._written = asyncio.Event()  # fewer are unanswered
        self._draining = False
        self._is_lost = False

    async def run(self) -> None:
        """Serve until the connection is closed, by whomever."""
        self._connection.on_lost = self._lost
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write())
                await self._read()
                writer.cancel()
        finally:
            self._lost()

    async def drain(self) -> None:
        """Take no more, answer what was taken, close with 1012.

        Messages that arrive meanwhile are dropped unanswered: after a 1012 a client sends
        what was not answered again, to the worker that its next connection reaches.
        """
        self._draining = True
        while self._unanswered and not self._is_lost:
            self._written.clear()
            await self._written.wait()
        await self._connection.close(
            CloseCode.SERVICE_RESTART, "worker restarts: reconnect, resend what was not answered"
        )

    def abort(self) -> None:
        """Cut the connection off."""
        self._connection.transport.abort()

    # ------------------------------------------------------------------ service.Caller

    def has_in_flight(self, request_id: str) -> bool:
        """Whether a request of this id waits for the device."""
        return request_id in self._ids

    def answer(self, payload: bytes, *, binary: bool, ticket: Ticket[InFlight] | None) -> None:
        """Have a reply written."""
        if ticket is not None:
            self._tickets.discard(ticket)
            self._ids.discard(ticket.payload.request.id or "")
        self._outbox.append((payload, binary))
        self._mail.set()

    # ------------------------------------------------------------------ tasks and callbacks

    async def _read(self) -> None:
        try:
            while True:
                while self._unanswered >= self._max_in_flight and not self._is_lost:
                    self._written.clear()
                    await self._written.wait()
                message = await self._connection.recv()
                if not self._draining:
                    self._take(message)
        except ConnectionClosed:
            pass  # also the normal end

    def _take(self, message: str | bytes) -> None:
        self._unanswered += 1
        ticket = self._service.receive(message, self)
        if ticket is not None:
            self._tickets.add(ticket)
            if ticket.payload.request.id is not None:
                self._ids.add(ticket.payload.request.id)

    async def _write(self) -> None:
        try:
            while True:
                await self._mail.wait()
                self._mail.clear()
                while self._outbox:
                    payload, binary = self._outbox.popleft()
                    await self._connection.send(payload, text=not binary)
                    self._unanswered -= 1
                    self._written.set()
        except ConnectionClosed:
            pass  # the reader sees it, too

    def _lost(self) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        for ticket in self._tickets:
            self._service.cancel(ticket)
        self._tickets.clear()
        self._outbox.clear()
        self._written.set()
