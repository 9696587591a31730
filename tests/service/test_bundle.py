"""The whole program with a real bundle and torch: serve, verify, predict."""

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from websockets.asyncio.client import connect

from gpu_service import bundle, models, protocol
from gpu_service.client import Client
from gpu_service.messages import Request, Response
from tests.service.conftest import ROOT, Process, get

Spawn = Callable[..., Process]

ARCHITECTURE = bundle.Architecture(name="digits_cnn", arguments={"width": 4})


def predicted(model: torch.nn.Module, images: NDArray[Any]) -> NDArray[Any]:
    with torch.inference_mode():
        logits: NDArray[Any] = model(torch.from_numpy(images)).numpy()
        return logits


def write(
    directory: Path,
    *,
    expected_off_by: float = 0.0,
    architecture: bundle.Architecture = ARCHITECTURE,
    version: str | None = None,
) -> Path:
    """A bundle of an untrained network; its samples' expected outputs may be wrong on purpose."""
    torch.manual_seed(0)
    model = models.build(ARCHITECTURE).eval()
    images = numpy.random.default_rng(0).random((16, 1, 28, 28), "f4")
    logits = predicted(model, images)
    return bundle.write(
        directory=directory,
        name="digits",
        version=version,
        architecture=architecture,
        inputs=(bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 28, 28)),),
        outputs=(bundle.TensorSpec(name="logits", datatype="FP32", shape=(10,)),),
        labels=tuple("0123456789"),
        training=bundle.Training(
            dataset="none",
            dataset_sha256="0" * 64,
            train_samples=1,
            test_samples=1,
            epochs=1,
            seed=0,
            world_size=1,
            backend="gloo",
            torch=str(torch.__version__),
            metrics={},
        ),
        state_dict=model.state_dict(),
        samples={
            "image": images,
            "expected.logits": logits + numpy.float32(expected_off_by),
            "label": logits.argmax(-1),
        },
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"))


def serve(spawn: Spawn, path: Path, *options: str) -> Process:
    return spawn("serve", "--bundle", str(path), "--port", "0", *options, module="gpu_service")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpu_service", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


async def test_answers_equal_the_models_own(spawn: Spawn, path: Path) -> None:
    process = await asyncio.to_thread(serve, spawn, path, "--max-batch", "8", "--threads", "1")
    url = await asyncio.to_thread(lambda: process.url)
    images = numpy.random.default_rng(1).random((40, 1, 28, 28), "f4")
    expected = predicted(models.load_model(path), images)

    async with Client(url) as client:
        results = await asyncio.gather(
            *(client.infer({"image": images[n : n + 1]}) for n in range(40))
        )
    binary = numpy.concatenate([result.outputs["logits"] for result in results])
    # Batches of other sizes add in another order: equal but for the last bits.
    numpy.testing.assert_allclose(binary, expected, rtol=1e-5, atol=1e-6)

    async with connect(url, compression=None, proxy=None) as connection:
        request = Request(inputs={"image": images[:8]}, id="t", binary=False)
        await connection.send(protocol.encode_request(request), text=True)
        reply = protocol.decode_reply(await connection.recv())
    assert isinstance(reply, Response)
    numpy.testing.assert_allclose(reply.outputs["logits"], expected[:8], rtol=1e-5, atol=1e-6)

    metadata = json.loads((await asyncio.to_thread(get, process.port, "/v2/models/digits"))[2])
    assert metadata["parameters"] == {
        "labels": list("0123456789"),
        "digest": bundle.digest(path),
        "stateful": False,
        "many_responses": False,
    }


def test_people_and_deploys_can_ask_it(spawn: Spawn, path: Path, tmp_path: Path) -> None:
    process = serve(spawn, path, "--worker", "w1", "--max-batch", "4")

    verified = run("verify", "--bundle", str(path), process.url, "ws://127.0.0.1:1")
    assert verified.returncode == 1, verified.stderr
    good, bad = map(json.loads, verified.stdout.splitlines())
    assert good.pop("max_abs_diff") < 1e-5
    assert good == {
        "url": process.url,
        "ok": True,
        "worker": "w1",
        "model": "digits",
        "version": path.name,
        "error": None,
    }
    assert not bad["ok"]
    assert "Connection refused" in bad["error"]
    assert run("verify", "--bundle", str(path), process.url, process.url).returncode == 0

    told = run("predict", process.url, "--bundle", str(path), "--count", "20")
    assert told.returncode == 0, told.stderr
    *rows, summary = told.stdout.splitlines()[1:]
    assert len(rows) == 20
    assert all(f"digits {path.name}, w1" in row for row in rows)
    assert "20 of 20 right" in summary
    assert "by w1 (20)" in summary

    numpy.save(tmp_path / "one.npy", bundle.load_samples(path)["image"][0, 0])
    numpy.save(tmp_path / "three.npy", bundle.load_samples(path)["image"][:3])
    told = run(
        "predict", process.url, "--image", str(tmp_path / "one.npy"), str(tmp_path / "three.npy")
    )
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == 1 + 4 + 1
    assert "right" not in told.stdout


def test_verify_notices_another_version(spawn: Spawn, path: Path, tmp_path: Path) -> None:
    process = serve(spawn, path)
    other = write(tmp_path)
    if other.name == path.name:  # written within the same second
        other = other.rename(other.with_name(other.name + "-other"))
        manifest = json.loads((other / "manifest.json").read_text())
        manifest["version"] = other.name
        (other / "manifest.json").write_text(json.dumps(manifest))
    verified = run("verify", "--bundle", str(other), process.url)
    assert verified.returncode == 1
    assert f"serves digits {path.name}, expected digits {other.name}" in verified.stdout


def test_a_model_that_answers_otherwise_is_never_served(spawn: Spawn, tmp_path: Path) -> None:
    process = serve(spawn, write(tmp_path, expected_off_by=0.01))
    assert process.wait() == 1
    reason = process.until("start_failed")["reason"]
    assert "self-test of model digits" in reason
    assert "off by 0.01" in reason


def test_a_damaged_bundle_is_never_served(spawn: Spawn, tmp_path: Path) -> None:
    path = write(tmp_path)
    weights = bytearray((path / bundle.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (path / bundle.WEIGHTS).write_bytes(weights)
    process = serve(spawn, path)
    assert process.wait() == 1
    failed = process.until("start_failed")
    assert "model.safetensors: sha256" in failed["reason"]
    assert "traceback" not in failed


def test_a_device_that_is_not_there_is_a_clear_failure(spawn: Spawn, path: Path) -> None:
    process = serve(spawn, path, "--device", "cuda:99")
    assert process.wait() == 1
    assert "device cuda:99: torch" in process.until("start_failed")["reason"]


def test_what_a_bundle_brings_runs_only_where_it_is_allowed(spawn: Spawn, tmp_path: Path) -> None:
    name = "gpu_service.models.digits:DigitsCNN"
    path = write(tmp_path, architecture=bundle.Architecture(name=name, arguments={"width": 4}))
    process = serve(spawn, path)
    assert process.wait() == 1
    reason = process.until("start_failed")["reason"]
    assert f"GPU_SERVICE_FACTORIES={name} or --factories {name}" in reason
    process = serve(spawn, path, "--factories", name)
    assert run("verify", "--bundle", str(path), process.url).returncode == 0


def test_models_come_and_go_while_a_worker_runs(spawn: Spawn, tmp_path: Path) -> None:
    def versions() -> list[str]:
        done = run("models", "list", *control)
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines()[1:]]

    control = ("--control", str(tmp_path / "control"))
    old = write(tmp_path / "models", version="v1")
    process = serve(spawn, old.parent, *control)
    assert process.url
    assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600
    assert versions() == ["v1"]
    assert run("models", "reload", *control).stdout == "nothing is new\n"

    bad = write(tmp_path / "other", version="v3", expected_off_by=0.1)
    done = run("models", "load", str(bad), *control)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_service models load: self-test of model digits v3")
    assert versions() == ["v1"]

    new = write(tmp_path / "models", version="v2")
    assert run("models", "load", str(new), *control).stdout == "serves digits v2\n"
    assert sorted(versions()) == ["v1", "v2"]
    done = run("models", "unload", "digits", "--version", "v1", *control)
    assert done.stdout == "unloaded digits v1\n"
    assert versions() == ["v2"]
    done = run("models", "unload", "cats", *control)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model 'cats' is not loaded (NOT_FOUND)" in done.stderr
    assert run("verify", "--bundle", str(new), process.url).returncode == 0
