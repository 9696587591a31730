"""The HTTP side over real sockets."""

import asyncio
import json

import pytest

from tests.service.conftest import Worker, get
from tests.service.fakes import frame


@pytest.mark.parametrize(
    ("path", "status", "content_type"),
    [
        ("/v2/health/live", 200, "application/json"),
        ("/v2/health/ready", 200, "application/json"),
        ("/v2", 200, "application/json"),
        ("/v2/models/double", 200, "application/json"),
        ("/v2/models/double/versions/7", 200, "application/json"),
        ("/v2/models/double/ready", 200, "application/json"),
        ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8"),
        ("/v2/models/none", 404, "application/json"),
        ("/", 426, "text/plain; charset=utf-8"),
    ],
)
async def test_paths(worker: Worker, path: str, status: int, content_type: str) -> None:
    got, headers, body = await asyncio.to_thread(get, worker.port, path)
    assert (got, headers["Content-Type"]) == (status, content_type)
    assert int(headers["Content-Length"]) == len(body)
    if content_type == "application/json":
        json.loads(body)


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_head_has_no_body_and_other_methods_are_refused(worker: Worker) -> None:
    head = await raw(worker.port, b"HEAD /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    post = await raw(worker.port, b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert post.startswith(b"HTTP/1.1 405 Method Not Allowed\r\n")
    assert b"Allow: GET, HEAD\r\n" in post


async def test_metrics_describe_the_build_and_the_model(worker: Worker) -> None:
    async with worker.connect() as connection:
        await connection.send(frame(1, 2, 3))
        await connection.recv()
        assert await worker.metric("gpu_service_connections") == 1
    text = (await asyncio.to_thread(get, worker.port, "/metrics"))[2].decode()
    assert 'gpu_service_model_info{digest="d00b1e",name="double",version="7"} 1.0' in text
    assert 'device="none"' in text
    assert await worker.metric("gpu_service_ready") == 1
    assert await worker.metric('gpu_service_batch_samples_bucket{le="2.0"}') == 0
    assert await worker.metric('gpu_service_batch_samples_bucket{le="4.0"}') == 1
    for stage in ("queue", "input", "infer", "output", "total"):
        assert await worker.metric(f'gpu_service_stage_seconds_count{{stage="{stage}"}}') == 1
