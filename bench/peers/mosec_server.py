"""The example model behind mosec: `python mosec_server.py MODEL MAX_BATCH MAX_WAIT_MS FUSED`.

Address and port come from mosec's own MOSEC_ADDRESS and MOSEC_PORT. Runs in mosec's own
environment, without this project: MODEL is the traced forward, in a file; FUSED is 1 for fused
kernels, of each size of batch. Bodies of requests and responses are the tensors' bytes, which is
what costs mosec least.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import torch
from mosec import Server, Worker

MODEL = sys.argv[1]
MAX_BATCH = int(sys.argv[2])
MAX_WAIT_MS = int(sys.argv[3])
FUSED = sys.argv[4] == "1"
IMAGE = (1, 28, 28)


class Digits(Worker):
    """float32 [1, 28, 28] as bytes → float32 [10] as bytes."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        trace = torch.jit.load(MODEL)
        torch.jit.enable_onednn_fusion(FUSED)
        model = torch.jit.freeze(trace)
        self._models = {}
        with torch.inference_mode():
            for size in range(1, MAX_BATCH + 1):
                # Kernels are fused for the sizes of the second run.
                self._models[size] = torch.jit.freeze(trace) if FUSED else model
                for _ in range(3):
                    self._models[size](torch.zeros(size, *IMAGE))

    def deserialize(self, data: bytes) -> Any:
        """The body as it is: all of a batch are joined in one copy."""
        return data

    def serialize(self, data: Any) -> bytes:
        """A row of the outputs."""
        body: bytes = data.tobytes()
        return body

    @torch.inference_mode()
    def forward(self, data: list[bytes]) -> list[Any]:
        """One batch."""
        joined = bytearray().join(data)
        inputs = torch.frombuffer(joined, dtype=torch.float32).view(len(data), *IMAGE)
        outputs: numpy.ndarray[Any, Any] = self._models[len(data)](inputs).numpy()
        return list(outputs)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Digits, num=1, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    server.run()
