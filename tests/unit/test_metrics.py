import re

from gpu_service.metrics import OK, Metrics, Reason
from gpu_service.protocol import ErrorCode


def value(metrics: Metrics, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", metrics.exposition().decode(), re.MULTILINE)
    assert match, name
    return float(match[1])


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
    queued = iter((3, 7, 0))
    metrics.describe(build={}, model={"name": "m"}, queued_samples=lambda: next(queued))
    assert value(metrics, "gpu_service_queued_samples") == 3
    assert value(metrics, "gpu_service_queued_samples") == 7
    assert value(metrics, 'gpu_service_model_info{name="m"}') == 1
