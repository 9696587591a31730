"""`predict` with files, images and standard input, against a real server."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpu_service import predict
from gpu_service.predict import STANDARD_INPUT, InputError
from tests.service.conftest import ROOT, Process
from tests.service.fakes import BOUND_S, POISON

Spawn = Callable[..., Process]

ONE = numpy.array([4.0, 0.5, 1.0], "f4")  # doubled by the model: "a" is the greatest
TWO = numpy.array([[4.0, 0.5, 1.0], [0.0, 0.5, 9.0]], "f8")


@pytest.fixture
def server(spawn: Spawn) -> Process:
    process = spawn("--worker", "w1")
    process.until("ready")
    return process


def npy(*arrays: Any) -> bytes:
    stream = io.BytesIO()
    for array in arrays:
        numpy.save(stream, array)
    return stream.getvalue()


def asked(
    server: Process, *files: Path, stdin: bytes = b"", **options: Any
) -> list[dict[str, Any]]:
    """What is printed as JSON; the exit code must fit."""
    output = io.StringIO()
    code = predict.main(
        url=server.url,
        path=None,
        files=files,
        count=options.get("count"),
        as_json=True,
        output=output,
        standard_input=io.BytesIO(stdin),
    )
    predictions = [json.loads(line) for line in output.getvalue().splitlines()]
    assert code == (1 if any(p["error"] is not None for p in predictions) else 0)
    return predictions


def test_json_has_everything(server: Process, tmp_path: Path) -> None:
    file = tmp_path / "one.npy"
    file.write_bytes(npy(ONE))
    assert asked(server, file) == [
        {
            "sample": 1,
            "source": str(file),
            "predicted": "a",
            "confidence": pytest.approx(0.997, abs=1e-3),
            "truth": None,
            "model": "double",
            "version": "7",
            "worker": "w1",
            "outputs": {"y": [8.0, 1.0, 2.0]},
            "error": None,
        }
    ]


def test_several_files_and_standard_input_in_order(server: Process, tmp_path: Path) -> None:
    file = tmp_path / "two.npy"
    file.write_bytes(npy(TWO))
    predictions = asked(server, file, STANDARD_INPUT, file, stdin=npy(ONE, TWO))
    assert [p["predicted"] for p in predictions] == ["a", "c", "a", "a", "c", "a", "c"]
    assert [p["sample"] for p in predictions] == [1, 2, 3, 4, 5, 6, 7]
    assert [p["source"] for p in predictions] == [str(file)] * 2 + ["standard input"] * 3 + [
        str(file)
    ] * 2


def test_an_image_is_scaled(server: Process, tmp_path: Path) -> None:
    file = tmp_path / "line.pgm"
    file.write_bytes(b"P5 3 1 255\n" + bytes([0, 51, 255]))
    (prediction,) = asked(server, file)
    assert prediction["outputs"]["y"] == pytest.approx([0, 0.4, 2])
    assert asked(server, STANDARD_INPUT, stdin=file.read_bytes())[0]["predicted"] == "c"


def test_a_failed_sample_fails_alone(server: Process) -> None:
    poison = numpy.array([[POISON] * 3, [1, 2, 3]], "f4")
    failed, predicted = asked(server, STANDARD_INPUT, stdin=npy(poison))
    assert failed["error"].startswith("INTERNAL: ")
    assert failed["predicted"] is failed["outputs"] is None
    assert predicted["predicted"] == "c"


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"", "standard input: cannot be read as a .npy array, a PNG or a PGM image"),
        (b"hello", "cannot be read as"),
        (npy(ONE) + b"rest", "cannot be read as"),
        (npy(ONE)[:-1], "cannot be read as"),
        (npy(numpy.array([{}], object)), "cannot be read as"),
        (npy(numpy.zeros((0, 3), "f4")), "not a single sample"),
        (npy(numpy.zeros(3, "i4")), "holds int32, the model takes FP32"),
        (b"P5 4 1 255\n0000", "1 pixels high and 4 wide, does not fit"),
        (b"P5 4 1 65535\n0000", "standard input: its white is 65535"),
    ],
)
def test_what_cannot_be_used_is_said(server: Process, stdin: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(server, STANDARD_INPUT, stdin=stdin)


def test_standard_input_is_read_once_and_not_from_a_terminal(server: Process) -> None:
    with pytest.raises(InputError, match="once only"):
        asked(server, STANDARD_INPUT, STANDARD_INPUT)

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(InputError, match="is a terminal"):
        predict.main(
            url=server.url,
            path=None,
            files=[STANDARD_INPUT],
            count=None,
            standard_input=Terminal(),
        )


def test_a_pipe_into_the_command(server: Process) -> None:
    command = [sys.executable, "-m", "gpu_service", "predict", server.url, "--image", "-"]
    for arguments, expected in (
        (["--json"], '{"sample":1,"source":"standard input","predicted":"a"'),
        ([], "     #  predicted"),
    ):
        result = subprocess.run(
            command + arguments, cwd=ROOT, input=npy(ONE), capture_output=True, timeout=BOUND_S
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode().startswith(expected)
