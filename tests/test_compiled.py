"""The service as hosts run it where it could be compiled: its own tests, once more.

Those of what is compiled, and of what a client sees of it. The deploys of tests/deploy run the
compiled service, too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from provision import compiled
from provision.rendering import CHECKOUT

_TESTS = (
    "tests/unit/test_batching.py",
    "tests/unit/test_dispatch.py",
    "tests/unit/test_protocol.py",
    "tests/unit/test_protocol_properties.py",
    "tests/unit/test_registry.py",
    "tests/unit/test_service_properties.py",
    "tests/unit/test_signature.py",
    "tests/service/test_admission.py",
    "tests/service/test_policy.py",
    "tests/service/test_requests.py",
    "tests/service/test_sequences.py",
    "tests/service/test_wire.py",
)
_TIMEOUT_S = 600


def test_compiled_it_does_the_same(tmp_path: Path) -> None:
    folder = compiled.build()
    for name in ("gpu_service", "fuzz", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / "gpu_service")
    proves = "from gpu_service.server import is_compiled; raise SystemExit(not is_compiled())"
    subprocess.run([sys.executable, "-c", proves], cwd=tmp_path, check=True)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses", "0", *_TESTS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    print(result.stdout[-8000:], result.stderr[-2000:])
    assert result.returncode == 0
