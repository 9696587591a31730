"""The example model behind pytriton: `python pytriton_server.py MODEL MAX_BATCH DELAY_US
HTTP_THREADS HTTP_PORT GRPC_PORT METRICS_PORT`.

Runs in pytriton's own environment, without this project: MODEL is the traced forward, in a file.
Clients use the binary extension of the Open Inference Protocol.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy
import torch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MODEL = sys.argv[1]
MAX_BATCH, DELAY_US, THREADS = map(int, sys.argv[2:5])
HTTP_PORT, GRPC_PORT, METRICS_PORT = map(int, sys.argv[5:8])
IMAGE = (1, 28, 28)


def main() -> None:
    """Serve until SIGTERM."""
    torch.set_num_threads(1)
    model = torch.jit.freeze(torch.jit.load(MODEL))
    with torch.inference_mode():
        for size in range(1, MAX_BATCH + 1):
            model(torch.zeros(size, *IMAGE))

    def infer(requests: list[Any]) -> list[Any]:
        # Not pytriton's @batch, which costs more than these lines.
        images = [request.data["image"] for request in requests]
        joined = torch.from_numpy(numpy.concatenate(images))
        with torch.inference_mode():
            outputs = model(joined).numpy()
        ends = numpy.cumsum([len(image) for image in images])[:-1]
        return [{"logits": each} for each in numpy.split(outputs, ends)]

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=HTTP_PORT,
        http_thread_count=THREADS,
        grpc_address="127.0.0.1",
        grpc_port=GRPC_PORT,
        metrics_address="127.0.0.1",
        metrics_port=METRICS_PORT,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="digits",
            infer_func=infer,
            inputs=[Tensor(name="image", dtype=numpy.float32, shape=IMAGE)],
            outputs=[Tensor(name="logits", dtype=numpy.float32, shape=(10,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH,
                batcher=DynamicBatcher(max_queue_delay_microseconds=DELAY_US),
            ),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
