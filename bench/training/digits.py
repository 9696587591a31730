"""How right the example model is on held-out images: `make model`, with nothing changed.

`python -m bench.training.digits models/digits` takes the newest that `make model` has written;
without an argument, one is trained.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.results import Row, write
from bench.training.launching import launch
from gpu_service import bundle

COMMAND = "python -m bench.training.digits"


def main() -> int:
    """0 when the bar holds."""
    with tempfile.TemporaryDirectory() as name:
        if not sys.argv[1:]:
            launch(2, "gpu_service.training", "--output", name, timeout_s=3600)
        folder = Path(sys.argv[1]) if sys.argv[1:] else Path(name, "digits")
        training = bundle.verify(bundle.find(folder)).training
    assert training is not None
    accuracy = training.metrics["test_accuracy"]
    name = f"training: digits, right of {training.test_samples:,} held-out images"
    rows = [Row(name=name, value=accuracy, unit="", at_least=0.985, counted=True)]
    return 0 if write("training", COMMAND, rows) else 1


if __name__ == "__main__":
    sys.exit(main())
