"""The process around a worker: what it asks of the C library."""

import subprocess
import sys

import pytest

# Three blocks are more than twice the largest one, which is what glibc keeps of its own accord.
_FORWARDS = """
import resource
from gpu_service import worker

if {keeps}:
    worker.keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def forward():
    return [bytearray(8 << 20) for _ in range(3)]

forward(), forward()
before = faults()
for _ in range(10):
    forward()
print(faults() - before)
"""


def page_faults(*, keeps: bool, **environ: str) -> int:
    """Of ten forwards whose layers take 24 MiB: 6,144 pages of 4 KiB each, or 12 of 2 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", _FORWARDS.format(keeps=keeps)],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(run.stdout)


def test_memory_that_a_forward_frees_stays_with_the_process() -> None:
    assert page_faults(keeps=True) < page_faults(keeps=False) / 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "4096"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=4096")],
)
def test_who_chooses_for_glibc_in_the_environment_is_right(name: str, value: str) -> None:
    assert page_faults(keeps=True, **{name: value}) > page_faults(keeps=False) / 2
