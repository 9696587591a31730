import json

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


class Worker:
    ready = True


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def routes(worker: Worker) -> Routes:
    return Routes(
        model=MODEL,
        server={"name": "gpu-service", "worker": "w1", "deployment": "d"},
        is_ready=lambda: worker.ready,
        metrics=lambda: b"a_metric 1\n",
    )


def ask(routes: Routes, target: str) -> tuple[int, dict[str, object]]:
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
    assert content["models"] == [{"name": "digits", "version": "2.0", "digest": "d1"}]


@pytest.mark.parametrize("path", ["/v2/models/digits", "/v2/models/%64igits/versions/2.0"])
def test_a_model_is_described(routes: Routes, path: str) -> None:
    status, content = ask(routes, path)
    assert status == 200
    assert content["parameters"] == {"labels": ["a", "b", "c"], "digest": "d1"}


@pytest.mark.parametrize("path", ["/v2/models/cats", "/v2/models/digits/versions/1", "/v2/x"])
def test_what_is_not_there_is_not_found(routes: Routes, path: str) -> None:
    status, content = ask(routes, path)
    assert status == 404
    assert content["error"] == {"code": "NOT_FOUND", "message": f"nothing at {path}"}


def test_other_paths_are_left_to_websocket(routes: Routes) -> None:
    assert routes.answer("/", upgrade=True) is None
    assert routes.answer("/", upgrade=False) is None
    assert routes.answer("/v2/models/digits/infer", upgrade=True) is None


def test_metrics_are_text(routes: Routes) -> None:
    answer = routes.answer("/metrics", upgrade=False)
    assert answer is not None
    assert answer.content_type.startswith("text/plain; version=")
    assert answer.body == b"a_metric 1\n"
