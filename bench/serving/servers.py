"""What is measured beside the service itself: `python -m bench.serving.servers identity|echo PORT`.

`identity` is the service with a model that computes nothing, through the same seam as any other
engine. `echo` is picows' echo server: what a WebSocket server that does nothing else can do.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy

from gpu_service import worker
from gpu_service.bundle import TensorSpec
from gpu_service.device import BatchOutput, Engine, Tensors
from gpu_service.settings import Settings
from gpu_service.signature import ModelInfo

VALUES = 784  # float32: 3,136 bytes, as the images of the example model


class Identity(Engine):
    """y = x. An `Engine`."""

    model = ModelInfo(
        name="identity",
        version="1",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(VALUES,)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(VALUES,)),),
    )
    description = {"device": "none"}  # noqa: RUF012 - fixed
    quick_batch = 1024

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        # As the engine joins inputs: quicker than numpy does it.
        joined = b"".join([each["x"].data for each in requests])
        return BatchOutput(outputs={"y": numpy.frombuffer(joined, "<f4").reshape(-1, VALUES)})


async def echo(port: int) -> None:
    import picows
    import uvloop

    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)

    class Echo(picows.WSListener):  # type: ignore[misc]
        def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
            if frame.msg_type == picows.WSMsgType.CLOSE:
                transport.send_close(frame.get_close_code(), frame.get_close_message())
                transport.disconnect()
            else:
                transport.send(frame.msg_type, frame.get_payload_as_memoryview())

    listening = await picows.ws_create_server(lambda request: Echo(), "127.0.0.1", port)
    await listening.serve_forever()


def main() -> int:
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "echo":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(echo(port))
        return 0
    settings = Settings(bundle=(Path("none"),), port=port)
    return worker.run(settings, open_engine=lambda chosen, path: Identity())


if __name__ == "__main__":
    sys.exit(main())
