"""`pyinfra INVENTORY deploy.py` on a bad day, as the operator meets it: one list, nothing touched.

The hosts' addresses are on loopback with nobody listening: a connection would show as an error.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from gpu_service import bundle
from provision import drift

CHECKOUT = Path(__file__).resolve().parents[3]

GOOD_GATEWAY = '("gw1", {"address": "10.0.0.11", "ssh_hostname": "127.0.0.1", "ssh_port": 9})'
GOOD_WORKER = '("gpu1", {"address": "10.0.0.21", "ssh_hostname": "127.0.0.1", "ssh_port": 9})'


def deploy(tmp_path: Path, *, gateways: str, workers: str, arguments: tuple[str, ...] = ()) -> str:
    """Output of a deploy that has to fail, on an inventory of these groups."""
    inventory = tmp_path / "inventory.py"
    inventory.write_text(
        "from provision.preflight import check_inventory\n"
        f"gateways = [{gateways}]\nworkers = [{workers}]\ncheck_inventory(__file__)\n"
    )
    pyinfra = Path(sys.executable).with_name("pyinfra")
    result = subprocess.run(
        [str(pyinfra), "-y", str(inventory), *(arguments or ("deploy.py",))],
        cwd=CHECKOUT,
        env={**os.environ, "PYINFRA_PROGRESS": "off"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


def test_all_problems_of_all_hosts_and_files_are_listed_before_any_connection(
    tmp_path: Path,
) -> None:
    output = deploy(
        tmp_path,
        gateways='("gw1", {"address": "10.0.0.11", "listen_prot": 1})',
        workers='("gpu1", {"address": "10.0.0.21", "model": "models/nothing"}), '
        '("gpu2", {"address": "10.0.0.22", "model": "models/nothing", "worker_ports": [5, 5]})',
    )
    assert "3 problems, nothing was touched" in output
    assert "gw1: unknown setting listen_prot; did you mean listen_port?" in output
    assert "model models/nothing" in output
    assert "gpu_service.training" in output  # the way to get one
    assert "gpu2: worker_ports names 5 more than once" in output
    assert "Connecting" not in output
    assert "Traceback" not in output


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "models" / "digits" / "1"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text('{"format": 1}')
    worker = f'("gpu1", {{"address": "10.0.0.21", "model": "{damaged}"}})'
    output = deploy(tmp_path, gateways=GOOD_GATEWAY, workers=worker)
    assert "1 problem, nothing was touched" in output
    assert "manifest.json" in output
    assert "Connecting" not in output


def test_files_that_are_named_and_cannot_be_used_are_refused(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("a-token-itself\n")
    data = f'"worker_tokens": "{tokens}", "worker_packages": ["dist/mine-1.0-py3-none-any.whl"]'
    output = deploy(
        tmp_path,
        gateways=GOOD_GATEWAY,
        workers=f'("gpu1", {{"address": "10.0.0.21", "model": "models/nothing", {data}}})',
    )
    assert "3 problems, nothing was touched" in output
    assert "worker_packages: dist/mine-1.0-py3-none-any.whl is no file" in output
    assert f"worker_tokens: tokens file {tokens}, line 1" in output
    assert "a-token-itself" not in output
    assert "Connecting" not in output


def test_a_fact_can_be_asked_without_a_bundle(tmp_path: Path) -> None:
    worker = GOOD_WORKER.replace("}", ', "model": "models/nothing"}')
    output = deploy(
        tmp_path, gateways=GOOD_GATEWAY, workers=worker, arguments=("fact", "server.Hostname")
    )
    assert "nothing was touched" not in output
    assert "Connecting" in output


@pytest.mark.parametrize("key", ["ssh_user", "ssh_key", "_sudo"])
def test_keys_of_pyinfra_itself_are_no_unknown_settings(tmp_path: Path, key: str) -> None:
    data = f', "{key}": "x", "unknown_one": 1, "model": "models/nothing"}}'
    worker = GOOD_WORKER.replace("}", data)
    output = deploy(tmp_path, gateways=GOOD_GATEWAY, workers=worker)
    assert "unknown setting unknown_one" in output
    assert f"unknown setting {key}" not in output


def write_bundle(directory: Path, metrics: dict[str, float]) -> Path:
    tensor = (bundle.TensorSpec(name="x", datatype="FP32", shape=()),)
    return bundle.write(
        directory=directory,
        name="numbers",
        version="v1",
        architecture=bundle.Architecture(name="my.nets:Identity", arguments={}),
        inputs=tensor,
        outputs=(bundle.TensorSpec(name="y", datatype="FP32", shape=()),),
        labels=(),
        state_dict={"a": torch.ones(2)},
        samples={"x": numpy.ones(2, "f4"), "expected.y": numpy.ones(2, "f4")},
        training=bundle.Training(
            dataset="d",
            dataset_sha256="0" * 64,
            train_samples=1,
            test_samples=1,
            epochs=1,
            seed=0,
            world_size=1,
            backend="gloo",
            torch="2",
            metrics=metrics,
        ),
    )


def test_a_bundle_below_the_stated_metrics_is_refused_with_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_bundle(tmp_path, {"test_accuracy": 0.93, "test_loss": 0.7})
    data = '"min_metrics": {"test_accuracy": 0.98}, "max_metrics": {"test_loss": 0.6, "lag": 1}'
    worker = f'{{"address": "10.0.0.21", "model": "{model}", {data}}}'
    output = deploy(
        tmp_path,
        gateways=GOOD_GATEWAY,
        workers=f'("gpu1", {worker}), ("gpu2", {worker.replace("21", "22")})',
    )
    assert "test_accuracy is 0.93, and min_metrics wants at least 0.98" in output
    assert "test_loss is 0.7, and max_metrics wants at most 0.6" in output
    assert "no metric lag, of which a bar is set; its metrics: test_accuracy, test_loss" in output
    assert output.count("test_accuracy is 0.93") == 1  # the same bundle on two hosts
    assert "nothing was touched" in output
    assert "Connecting" not in output
    inventory = str(tmp_path / "inventory.py")
    assert drift.main([inventory]) == drift.ERROR  # it cannot be told, and why
    assert "test_accuracy is 0.93" in capsys.readouterr().err
