import re
from typing import Any

from gpu_service.messages import ErrorCode
from gpu_service.metrics import OK, Metrics, ModelFigures, Reason


def value(metrics: Metrics, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", metrics.exposition().decode(), re.MULTILINE)
    assert match, name
    return float(match[1])


def figures(name: str, *, version: str = "1", **counts: Any) -> ModelFigures:
    counts = {"requests_ok": 0, "queued_samples": 0, "sequences": 0} | counts
    return ModelFigures(name=name, version=version, digest="d", **counts)


def test_every_end_is_there_from_the_start_and_counts_once() -> None:
    metrics = Metrics(max_batch=4)
    for code in (OK, *ErrorCode):
        assert value(metrics, f'gpu_service_requests_total{{code="{code}"}}') == 0
    for reason in Reason:
        assert value(metrics, f'gpu_service_failures_total{{reason="{reason}"}}') == 0
    metrics.ended(OK)
    metrics.ended(ErrorCode.UNAVAILABLE, Reason.QUEUE_FULL)
    assert value(metrics, 'gpu_service_requests_total{code="OK"}') == 1
    assert value(metrics, 'gpu_service_requests_total{code="UNAVAILABLE"}') == 1
    assert value(metrics, 'gpu_service_failures_total{reason="queue_full"}') == 1


def test_a_value_on_a_bound_belongs_to_it_and_buckets_add_up() -> None:
    metrics = Metrics(max_batch=4)
    for samples in (1, 2, 3, 4, 100):
        metrics.batch_samples.observe(samples)
    buckets = [
        value(metrics, f'gpu_service_batch_samples_bucket{{le="{bound}"}}')
        for bound in ("1.0", "2.0", "4.0", "8.0", "+Inf")
    ]
    assert buckets == [1, 2, 4, 4, 5]
    assert value(metrics, "gpu_service_batch_samples_sum") == 110
    assert value(metrics, "gpu_service_batch_samples_count") == 5


def test_what_is_queued_is_asked_at_each_scrape() -> None:
    metrics = Metrics(max_batch=1)
    queued = iter((3, 7, 0, 0))
    metrics.describe(
        build={"version": "1.2"}, models=lambda: [figures("m", queued_samples=next(queued))]
    )
    assert value(metrics, "gpu_service_queued_samples") == 3
    assert value(metrics, "gpu_service_queued_samples") == 7
    assert value(metrics, 'gpu_service_model_info{digest="d",name="m",version="1"}') == 1
    assert metrics.exposition().count(b'gpu_service_build_info{version="1.2"} 1.0') == 1


def test_each_version_of_each_model_has_its_own_figures() -> None:
    metrics = Metrics(max_batch=1)
    served = [
        figures("m", requests_ok=5, queued_samples=2, sequences=1),
        figures("m", version="2", requests_ok=7, queued_samples=3),
        figures("n", sequences=4),
    ]
    metrics.describe(build={}, models=lambda: served)
    assert value(metrics, "gpu_service_queued_samples") == 5
    for name, wanted in (
        ("requests_total", [5, 7, 0]),
        ("queued_samples", [2, 3, 0]),
        ("sequences", [1, 0, 4]),
    ):
        assert [
            value(metrics, f'gpu_service_model_{name}{{model="{model}",version="{version}"}}')
            for model, version in (("m", "1"), ("m", "2"), ("n", "1"))
        ] == wanted
    del served[:2]
    assert b'model="m"' not in metrics.exposition()
    assert value(metrics, "gpu_service_queued_samples") == 0
