import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_service import __main__ as command_line
from gpu_service import admission, settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--bundle", "/nonexistent", "ws://127.0.0.1:1"],
        ["predict", "ws://127.0.0.1:1", "--image", "/nonexistent.npy"],
        ["load", "ws://127.0.0.1:1", "--bundle", "/nonexistent"],
        ["settings"],
        ["serve"],
        ["inspect", "/nonexistent"],
        ["compare", "/nonexistent", "/nonexistent"],
        ["models", "list", "--control", "/nonexistent"],
        ["token"],
    ],
)
def test_only_serving_and_bundling_import_torch(arguments: list[str]) -> None:
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
        ["bundle", "a:b", "--name", "n", "--output", "o"],
        ["bundle", "a:b", "--name", "n", "--input", "x:FP32:1"],
        ["bundle", "a:b", "--name", "n", "--input", "x", "--output", "o", "--seed", "-1"],
        ["bundle", "a:b", "--name", "n", "--input", "x", "--output", "o", "--sample-count", "0"],
        ["inspect"],
        ["compare", "a"],
        ["models"],
        ["models", "list"],
        ["models", "load", "--control", "c"],
        ["models", "unload", "--control", "c"],
        ["models", "list", "--control", "c", "--timeout-s", "0"],
        ["token", "two words"],
        ["token", "a#b"],
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


def test_a_token_and_the_line_that_admits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["token", "alice"]) == 0
    said = capsys.readouterr()
    token, line = said.out.splitlines()
    assert said.err == ""
    assert line == f"{hashlib.sha256(token.encode()).hexdigest()} alice"
    file = tmp_path / "tokens"
    file.touch(0o600)
    file.write_text(line)
    assert admission.Tokens(file).name_of(token) == "alice"
    assert command_line.main(["token"]) == 0
    other, line = capsys.readouterr().out.splitlines()
    assert other != token
    assert line == hashlib.sha256(other.encode()).hexdigest()
