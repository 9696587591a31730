import json
from typing import Any

import msgspec
import pytest

from gpu_service.bundle import TensorSpec
from gpu_service.routes import Routes
from gpu_service.signature import ModelInfo

MODEL = ModelInfo(
    name="digits",
    version="2.0",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(2,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(3,)),),
    labels=("a", "b", "c"),
    digest="d1",
)


OLDER = msgspec.structs.replace(MODEL, version="1.0", digest="d0")
OTHER = msgspec.structs.replace(MODEL, name="cats", digest="d2")


class Worker:
    ready = True
    models = (MODEL, OLDER)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def routes(worker: Worker) -> Routes:
    return Routes(
        models=lambda: worker.models,
        server={"name": "gpu-service", "worker": "w1", "deployment": "d"},
        is_ready=lambda: worker.ready,
        metrics=lambda: b"a_metric 1\n",
    )


def ask(routes: Routes, target: str) -> tuple[int, dict[str, Any]]:
    answer = routes.answer(target, upgrade=False)
    assert answer is not None
    assert answer.content_type == "application/json"
    return answer.status, json.loads(answer.body)


def test_live_is_independent_of_ready(routes: Routes, worker: Worker) -> None:
    worker.ready = False
    assert ask(routes, "/v2/health/live") == (200, {"live": True})


@pytest.mark.parametrize(
    "path",
    ["/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits/versions/2.0/ready"],
)
def test_ready_follows_the_worker(routes: Routes, worker: Worker, path: str) -> None:
    assert ask(routes, path) == (200, {"ready": True})
    worker.ready = False
    assert ask(routes, path) == (503, {"ready": False})


def test_the_server_tells_who_it_is_and_what_it_serves(routes: Routes) -> None:
    status, content = ask(routes, "/v2/?pretty=1")
    assert status == 200
    assert content["worker"] == "w1"
    assert content["models"] == [
        {"name": "digits", "version": "2.0", "digest": "d1"},
        {"name": "digits", "version": "1.0", "digest": "d0"},
    ]


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("/v2/models/digits", "d1"),
        ("/v2/models/%64igits/versions/2.0", "d1"),
        ("/v2/models/digits/versions/1.0/", "d0"),
    ],
)
def test_a_model_is_described(routes: Routes, path: str, digest: str) -> None:
    status, content = ask(routes, path)
    assert status == 200
    assert content["versions"] == ["2.0", "1.0"]
    assert content["parameters"]["labels"] == ["a", "b", "c"]
    assert content["parameters"]["digest"] == digest


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/cats",
        "/v2/models/digits/versions/3",
        "/v2/models/digits/versions",
        "/v2/models/digits/x",
        "/v2/models/",
        "/v2/x",
    ],
)
def test_what_is_not_there_is_not_found(routes: Routes, path: str) -> None:
    status, content = ask(routes, path)
    assert status == 404
    assert content["error"] == {"code": "NOT_FOUND", "message": f"nothing at {path.rstrip('/')}"}


def test_models_come_and_go(routes: Routes, worker: Worker) -> None:
    worker.models = (OTHER,)
    assert ask(routes, "/v2/models/cats")[0] == 200
    assert ask(routes, "/v2/models/cats/ready") == (200, {"ready": True})
    assert ask(routes, "/v2/models/digits/ready")[0] == 404


def test_other_paths_are_left_to_websocket(routes: Routes) -> None:
    assert routes.answer("/", upgrade=True) is None
    assert routes.answer("/", upgrade=False) is None
    assert routes.answer("/v2/models/digits/infer", upgrade=True) is None


def test_metrics_are_text(routes: Routes) -> None:
    answer = routes.answer("/metrics", upgrade=False)
    assert answer is not None
    assert answer.content_type.startswith("text/plain; version=")
    assert answer.body == b"a_metric 1\n"
