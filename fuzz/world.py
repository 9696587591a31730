"""The service without sockets or threads: several clients, one device, and chance.

Owns a `Service` with its registry and dispatcher, whose inference thread is never started:
batches are launched and finished here, so that anything may happen before, between and
after. Checks that every message is answered once, and that nothing of it is kept.
"""

import asyncio
import collections
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from gpu_service.batches import Limits
from gpu_service.bundle import TensorSpec
from gpu_service.connection import Connection, InFlight
from gpu_service.device import BatchOutput, Engine, Stream, Tensors
from gpu_service.dispatch import Dispatcher, _Batch
from gpu_service.messages import Failure, Request, Response, Scalar
from gpu_service.metrics import Metrics
from gpu_service.protocol import decode_reply, encode_cancel, encode_cancel_sequence, encode_request
from gpu_service.registry import Registry
from gpu_service.service import Service
from gpu_service.signature import ModelInfo

POISON = 66.0  # makes the model raise
CLIENTS = 3
MAX_STREAMS = 3
MAX_STREAMS_PER_CLIENT = 2

# What comes after so many bytes is not looked at.
_MOST_BYTES = 300


def _model(version: str, *, keeps_state: bool) -> ModelInfo:
    scalar = TensorSpec(name="x", datatype="FP32", shape=())
    state = (TensorSpec(name="count", datatype="FP32", shape=()),) if keeps_state else ()
    return ModelInfo(
        name="counter" if keeps_state else "adder",
        version=version,
        inputs=(scalar,),
        outputs=(
            TensorSpec(name="y", datatype="FP32", shape=()),
            TensorSpec(name="stop", datatype="BOOL", shape=()),
        ),
        state=state,
        feedback={"y": "x"},
        done="stop",
        digest=f"{keeps_state}{version}",
    )


class Chance:
    """One byte after the other; zeros after the last."""

    def __init__(self, data: bytes) -> None:
        self._data = data[:_MOST_BYTES]
        self._at = 0

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._data)

    def __call__(self) -> int:
        self._at += 1
        return 0 if self._at > len(self._data) else self._data[self._at - 1]


class Counter(Engine):
    """y = x + 1 + the steps that the sequence has made; stop where that is above 5."""

    def __init__(self, version: str, *, keeps_state: bool) -> None:
        self._model = _model(version, keeps_state=keeps_state)
        self._keeps_state = keeps_state
        self._counts = numpy.zeros(MAX_STREAMS, "<f4")
        self._owners: list[Stream | None] = [None] * MAX_STREAMS
        self._is_closed = False
        self.problems: list[str] = []

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def description(self) -> Mapping[str, str]:
        return {"device": "none"}

    @property
    def max_streams(self) -> int:
        return MAX_STREAMS if self._keeps_state else 0

    def check(self) -> None:
        pass

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        self._look(streams)
        outputs = []
        for inputs, stream in zip(requests, streams, strict=True):
            x = inputs["x"]
            if (x == POISON).any():
                raise RuntimeError("poisoned")
            count = 0.0 if stream is None or stream.is_fresh else self._counts[stream.slot]
            outputs.append(x + 1 + count)
        for stream in filter(None, streams):
            self._counts[stream.slot] = 1 + (0 if stream.is_fresh else self._counts[stream.slot])
            stream.is_fresh = False
        y = numpy.concatenate(outputs).astype("<f4")
        return lambda: BatchOutput(outputs={"y": y, "stop": y > 5}, infer_s=1e-4)

    def close(self) -> None:
        self._is_closed = True

    def _look(self, streams: Sequence[Stream | None]) -> None:
        # Noted, not raised: whatever an engine raises is its requests' failure.
        held = [stream for stream in streams if stream is not None]
        if self._is_closed:
            self.problems.append("run after it was closed")
        if len({stream.slot for stream in held}) < len(held):
            self.problems.append("two steps with one state in one batch")
        for stream in held:
            if not stream.is_fresh and self._owners[stream.slot] is not stream:
                self.problems.append("the state is another sequence's by now")
            self._owners[stream.slot] = stream


class Client:
    """One connection. A `service.Caller` that counts."""

    request_id = "client"
    trace_parent: str | None = None

    def __init__(self, service: Service) -> None:
        self.is_clogged = False
        self.is_open = True
        self.unanswered = 0
        self.codes: list[str] = []  # of the errors that it got
        self.connection: Connection = service.connect(self)
        self._next_index: dict[str, int] = collections.defaultdict(int)

    def send(self, message: str | bytes) -> None:
        self.unanswered += 1
        self.connection.receive(message)

    def answer(self, pieces: list[Any], *, binary: bool, final: bool) -> None:
        assert self.is_open, "answered after it had gone"
        payload = b"".join(pieces)
        reply = decode_reply(payload if binary else payload.decode())
        assert isinstance(reply, Response | Failure)
        if isinstance(reply, Failure):
            assert final
            self.codes.append(reply.code)
            assert reply.code != "INTERNAL" or "log has the cause" in reply.message
        elif reply.index is not None:
            assert final == reply.final
        if reply.id is not None:
            self._check_order(reply, reply.id, final=final)
        if final:
            self.no_answer()

    def no_answer(self) -> None:
        self.unanswered -= 1
        assert self.unanswered >= 0, "more answers than messages"

    def close(self) -> None:
        self.is_open = False
        self.connection.close()

    def _check_order(self, reply: Response | Failure, request_id: str, *, final: bool) -> None:
        if isinstance(reply, Response) and reply.index is not None:
            assert reply.index == self._next_index[request_id]
            self._next_index[request_id] += 1
        in_flight = isinstance(reply, Failure) and "in flight" in reply.message
        if final and not in_flight:
            self._next_index.pop(request_id, None)


class World:
    """The service, its clients and its device. Needs a running event loop, which it makes turn."""

    def __init__(self, *, drain_timeout_s: float = 3600.0) -> None:
        self.metrics = Metrics(max_batch=4)
        self._dispatcher: Dispatcher[InFlight] = Dispatcher()
        self._dispatcher._loop = asyncio.get_running_loop()  # as start() does, without the thread
        self.registry: Registry[InFlight] = Registry(
            dispatcher=self._dispatcher,
            open_engine=lambda path: self._engine(path.name),
            limits=Limits(max_batch=4, max_queue=6),
            drain_timeout_s=drain_timeout_s,
            locate=lambda path: (path, path.name),
        )
        self._service = Service(
            registry=self.registry,
            metrics=self.metrics,
            worker="world",
            max_streams_per_connection=MAX_STREAMS_PER_CLIENT,
        )
        self._engines: list[Counter] = []
        self._versions = itertools.count(1)
        self._add(keeps_state=False)
        self._add(keeps_state=True)
        self.clients = [Client(self._service) for _ in range(CLIENTS)]
        self._launched: list[Any] = []

    def _engine(self, version: str, *, keeps_state: bool = True) -> Counter:
        engine = Counter(version, keeps_state=keeps_state)
        self._engines.append(engine)
        return engine

    def _add(self, *, keeps_state: bool) -> None:
        engine = self._engine(str(next(self._versions)), keeps_state=keeps_state)
        self.registry.add(engine, source=Path("nowhere"))

    async def live(self, chance: Chance) -> None:
        """Do what `chance` says until it ends; then as `end`."""
        while not chance.is_over:
            await self._step(chance)
        await self.end()

    async def end(self) -> None:
        """Let everything come to its end, and look whether it is one."""
        for client in self.clients:
            self._unclog(client)
        await self.run_all()
        for client in self.clients:
            assert client.unanswered == 0, "not answered"
            client.close()
        await self.run_all()
        assert self.metrics.in_flight.value == 0
        assert not [problem for engine in self._engines for problem in engine.problems]
        for served in self.registry.all():
            assert served.sequences == 0
            assert served.channel.streams == 0
            assert served.channel.queued_samples == 0
        await self.registry.close()

    async def _step(self, chance: Chance) -> None:
        match chance() % 16:
            case 0 | 1 | 2 | 3 | 4 | 5 | 6:
                client = self._client(chance)
                client.send(self._request(chance))
            case 7:
                self._client(chance).send(encode_cancel(str(chance() % 3)).decode())
            case 8:
                self._client(chance).send(encode_cancel_sequence(chance() % 3).decode())
            case 9 | 10:
                self.launch()
            case 11 | 12:
                self.finish()
            case 13:
                client = self._client(chance)
                if client.is_clogged:
                    self._unclog(client)
                else:
                    client.is_clogged = True
            case 14:
                number = chance() % CLIENTS
                self.clients[number].close()
                self.clients[number] = Client(self._service)
            case 15:
                await self._change_models(chance)
        await asyncio.sleep(0)

    async def _change_models(self, chance: Chance) -> None:
        if chance() % 2:
            self._add(keeps_state=bool(chance() % 2))
        elif len(everything := self.registry.all()) > 2:
            info = everything[chance() % len(everything)].info
            await self.registry.unload(info.name, info.version)

    def _client(self, chance: Chance) -> Client:
        return self.clients[chance() % CLIENTS]

    def _request(self, chance: Chance) -> str | bytes:
        """A request with some of the parameters that there are."""
        what, more = chance(), chance()
        parameters: dict[str, Scalar] = {}
        if what & 1:
            parameters["sequence_id"] = more % 3
            parameters["sequence_start"] = bool(more & 4)
            parameters["sequence_end"] = bool(more & 8)
        if what & 2:
            parameters["max_responses"] = 1 + (more >> 4) % 8
        if what & 4:
            parameters["priority"] = more % 10
        if what & 8:
            parameters["timeout_ms"] = 1e-6
        value = POISON if what & 48 == 48 else float(more % 7)
        request = Request(
            inputs={"x": numpy.full(1 + (more % 5 == 0) * (what % 3), value, "<f4")},
            id=None if more % 4 == 3 else str(more % 3),
            model_name="counter" if what & 64 else None,
            model_version=str(more % 6) if what & 128 and more & 1 else None,
            outputs=("y",) if more & 32 else None,
            parameters=parameters,
            binary=bool(what & 128),
        )
        payload = encode_request(request)
        return payload if request.binary else payload.decode()

    def _unclog(self, client: Client) -> None:
        client.is_clogged = False
        client.connection.unclog()

    # ------------------------------------------------------------------ the device

    def launch(self) -> bool:
        """Launch the next batch; False if there is none."""
        with self._dispatcher.lock:
            batch = self._dispatcher._pop_ahead() or self._take()
            if batch is None:
                self._close_engines()
                return False
        self._launched.append(self._dispatcher._launch(batch))
        return True

    def _take(self) -> _Batch[InFlight] | None:
        for channel in self._dispatcher._by_age():
            if tickets := channel.queue.take():
                return _Batch(channel, tickets)
        return None

    def _close_engines(self) -> None:
        for channel in list(self._dispatcher._channels):
            runs = any(launched.channel is channel for launched in self._launched)
            if channel in self._dispatcher._ended() and not runs:
                self._dispatcher._channels.remove(channel)
                channel.engine.close()

    def finish(self) -> None:
        """Finish the oldest batch, if there is one; the next turn of the loop delivers it."""
        if self._launched:
            self._dispatcher._finish(self._launched.pop(0))
            self._close_engines()

    async def run_all(self) -> None:
        """Run until nothing waits any more."""
        idle_turns = 0
        for _ in range(1000):
            is_busy = self.launch() or bool(self._launched)
            idle_turns = 0 if is_busy else idle_turns + 1
            self.finish()
            await asyncio.sleep(0)
            if idle_turns > 2:  # in which timers that are due have run, too
                return
        raise AssertionError("the device never becomes idle")


async def live(data: bytes) -> None:
    """A world in which `data` is what happens."""
    logging.disable()  # failures are logged, which is not what is looked at
    try:
        chance = Chance(data)
        await World(drain_timeout_s=3600.0 * (chance() % 2)).live(chance)
    finally:
        logging.disable(logging.NOTSET)
