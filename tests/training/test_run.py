"""Whole runs, as people start them: from a command to a bundle, or to a line that helps."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from gpu_service import bundle, models
from gpu_service.training import TrainingError, __main__, distributed, settings

CHECKOUT = Path(__file__).parents[2]
TRAINING = ("-m", "gpu_service.training")
TINY = ("--task", "bench.training.tiny:task", "--epochs", "2", "--batch-size", "12")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def first(environment: dict[str, str], models_dir: Path) -> "subprocess.CompletedProcess[str]":
    return torchrun(environment, models_dir, "first")


def torchrun(
    environment: dict[str, str], models_dir: Path, version: str
) -> "subprocess.CompletedProcess[str]":
    options = ("--output", str(models_dir), "--version", version, "--epochs", "1", "--seed", "5")
    return run(environment, *TORCHRUN, *TRAINING, *options)


def test_torchrun_writes_a_bundle_that_loads(
    first: "subprocess.CompletedProcess[str]", models_dir: Path
) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    path = bundle.latest(models_dir / "digits")
    manifest = bundle.verify(path)
    assert (manifest.name, manifest.version) == ("digits", "first")
    training = manifest.training
    assert (training.world_size, training.backend, training.seed) == (2, "gloo", 5)
    assert (training.train_samples, training.test_samples) == (4000, 1000)
    assert "held out" in training.split
    assert training.metrics["test_accuracy"] > 0.8  # after one epoch; chance is 0.1
    samples = bundle.load_samples(path)
    with torch.inference_mode():
        logits = models.load_model(path)(torch.from_numpy(samples["image"]))
    numpy.testing.assert_allclose(logits.numpy(), samples["expected.logits"], atol=1e-5)
    assert samples["label"].tolist() == [*range(10), *range(6)]
    assert (logits.argmax(dim=1).numpy() == samples["label"]).mean() > 0.6


def test_rank_0_alone_tells_how_it_goes(first: "subprocess.CompletedProcess[str]") -> None:
    lines = first.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("world size 2, gloo on cpu; MNIST")
    assert lines[1].startswith("epoch   1/1  loss ")
    assert "samples/s  efficiency " in lines[1]
    assert lines[1].endswith("ETA 0:00")
    assert lines[2].startswith("test loss 0.")
    assert lines[2].endswith("of 1000 held out")
    assert lines[3].endswith("digits/first")


def test_the_same_seed_gives_the_same_weights(
    first: "subprocess.CompletedProcess[str]", environment: dict[str, str], models_dir: Path
) -> None:
    again = torchrun(environment, models_dir, "again")
    assert again.returncode == 0, again.stdout + again.stderr
    digests = {
        version: hashlib.sha256(
            (models_dir / "digits" / version / bundle.WEIGHTS).read_bytes()
        ).hexdigest()
        for version in ("first", "again")
    }
    assert digests["first"] == digests["again"]


def test_one_process_needs_no_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    options = ("--output", str(tmp_path), "--epochs", "1", "--name", "alone")
    alone = run(environment, *TRAINING, *options)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert bundle.read_manifest(bundle.latest(tmp_path / "alone")).training.world_size == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--version", "taken"], "tiny/taken: this version exists already"),
        (["--version", "../up"], r"bad version '\.\./up'"),
        (["--name", "No"], "bad model name 'No'"),
        (["--epochs", "0"], "--epochs 0"),
        (["--output", "FILE"], "FILE/tiny: cannot create the folder"),
        (["--tensorboard", "board"], "needs the package tensorboard: pip install tensorboard"),
        (["--profile", "FILE"], "--profile FILE: "),
    ],
)
def test_what_cannot_end_well_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "tiny" / "taken").mkdir(parents=True)
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "process_group", lambda *_, **__: pytest.fail("began"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises((TrainingError, bundle.BundleError), match=message):
        __main__.run(settings.parse(["--output", ".", *TINY, *options]))


def test_a_mistake_is_one_line_without_a_traceback(
    environment: dict[str, str], tmp_path: Path
) -> None:
    refused = run(environment, *TRAINING, "--output", str(tmp_path), "--batch-size", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "training: --batch-size 0: not in 1..1e+09\n"


def test_torchrun_is_told_what_was_wrong(environment: dict[str, str], tmp_path: Path) -> None:
    """Its report of the first failure holds the message, not only an exit code."""
    (tmp_path / "digits" / "taken").mkdir(parents=True)
    options = ("--output", str(tmp_path), "--version", "taken")
    refused = run(environment, *TORCHRUN, *TRAINING, *options)
    assert refused.returncode != 0
    line, _, report = refused.stderr.partition("\n")
    assert line.startswith("training: ")
    assert "this version exists already" in line
    assert "BundleError" in report.partition("Root Cause")[2]


def test_the_old_launcher_still_works_with_a_word_on_torchrun(
    environment: dict[str, str], tmp_path: Path
) -> None:
    old = ("-W", "ignore", "-m", "torch.distributed.launch", "--nproc-per-node=1")
    options = ("--standalone", *TRAINING, "--output", str(tmp_path), *TINY)
    done = run(environment, *old, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training: torch.distributed.launch is going to be removed" in done.stderr
    assert bundle.verify(bundle.latest(tmp_path / "tiny"))


def test_a_run_that_was_complete_is_not_trained_again(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """As when a scheduler requeues what was killed after its bundle was written."""
    options = ("--output", str(tmp_path), "--snapshots", str(tmp_path / "snapshots"))
    first, second = (run(environment, *TRAINING, *options, *TINY) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "epoch   2/2" in first.stdout
    assert "epoch   2/2" not in second.stdout
    assert "this run had learnt to its end" in second.stdout
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]
    assert len(list((tmp_path / "tiny").iterdir())) == 1


def test_the_profiler_leaves_a_trace_of_each_rank(
    environment: dict[str, str], tmp_path: Path
) -> None:
    options = ("--output", str(tmp_path), "--profile", str(tmp_path / "traces"), *TINY)
    done = run(environment, *TRAINING, *options)
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "rank-0.json"
    assert "aten::convolution" in trace.read_text()


def test_a_rank_that_never_comes_is_waited_for_and_named(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--output", str(tmp_path), "--timeout-s", "1")
    (process,) = launch(2, *TRAINING, *options, ranks=[0])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "training: rank 0 of 2 did not find the others at 127.0.0.1:" in err


def test_a_rank_that_is_lost_ends_the_others(launch: Callable[..., Any], tmp_path: Path) -> None:
    first, second = launch(2, *TRAINING, "--output", str(tmp_path))
    while not (line := first.stdout.readline()).startswith("epoch"):
        assert line, "ended before its first epoch"
    second.kill()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "training: rank 0 of 2 lost contact with another rank" in err
    assert not list(tmp_path.rglob("manifest.json"))
