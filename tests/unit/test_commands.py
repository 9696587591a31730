import subprocess
import sys
from pathlib import Path

import pytest

from gpu_service import __main__ as command_line
from gpu_service import settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--bundle", "/nonexistent", "ws://127.0.0.1:1"],
        ["predict", "ws://127.0.0.1:1", "--image", "/nonexistent.npy"],
        ["load", "ws://127.0.0.1:1", "--bundle", "/nonexistent"],
        ["settings"],
        ["serve"],
    ],
)
def test_only_serving_imports_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from gpu_service.__main__ import main\n"
        f"main({arguments!r})\n"
        "from gpu_service import blocking, client, load, server, verify, predict\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_all_bad_settings_are_listed_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_SERVICE_THREADS", "-1")
    assert command_line.main(["serve", "--port", "x", "--max-bach", "3", "--verbose"]) == 2
    said = capsys.readouterr().err
    for part in ("--max-bach", "--verbose", "--port: 'x'", "GPU_SERVICE_THREADS: -1", "--bundle"):
        assert part in said


def test_a_missing_bundle_is_said_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["verify", "--bundle", "/nonexistent", "ws://127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gpu_service verify: /nonexistent: no bundle here")


def test_an_address_where_nothing_listens_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["predict", "ws://127.0.0.1:1", "--image", "x.npy"]) == 1
    assert "ws://127.0.0.1:1: cannot connect: Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["predict", "ws://x"],
        ["predict", "ws://x", "--bundle", "b", "--count", "0"],
        ["verify", "ws://x", "--bundle", "b", "--timeout-s", "0"],
        ["load", "ws://x"],
        ["load", "ws://x", "--bundle", "b", "--input", "x=y.npy"],
        ["load", "ws://x", "--input", "y.npy"],
        ["load", "ws://x", "--bundle", "b", "--rate", "-1"],
        ["load", "ws://x", "--bundle", "b", "--duration-s", "nan"],
        ["load", "ws://x", "--bundle", "b", "--requests", "0"],
        ["load", "ws://x", "--bundle", "b", "--plot", "plot.png"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_settings_prints_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["settings"]) == 0
    assert capsys.readouterr().out == settings.reference()
