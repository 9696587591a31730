"""Layers: what some hosts have over the base image. The last test needs a lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from lab import layer
from lab.errors import LabError
from lab.paths import LabPaths

Run = Callable[..., CompletedProcess[str]]


def test_a_layer_that_exists_is_used_and_belongs_to_its_base_image(tmp_path: Path) -> None:
    base = tmp_path / "cache/base-1"
    folder = f"slurm-{layer.recipe_digest(base)[:16]}"
    layer.layer_path(tmp_path, folder).mkdir(parents=True)
    said: list[str] = []
    found = layer.ensure("slurm", home=tmp_path, base=base, in_use=set, progress=said.append)
    assert (found, said) == (folder, [])
    assert layer.recipe_digest(base) != layer.recipe_digest(base.with_name("base-2"))


def test_a_layer_that_nobody_made_is_refused() -> None:
    with pytest.raises(LabError, match="no layer 'slurmy'; there is slurm"):
        layer.check(["slurm", "slurmy"])


def test_debians_files_lie_where_enterprise_linux_has_them() -> None:
    found = [
        layer.on_host(path)
        for path in (
            "usr/sbin/slurmctld-wlm",
            "usr/sbin/slurmd-wlm",
            "lib/systemd/system/munge.service",
            "usr/lib/x86_64-linux-gnu/libmunge.so.2",
            "usr/lib/x86_64-linux-gnu/slurm-wlm/auth_munge.so",
            "usr/bin/srun",
        )
    ]
    assert layer.split(found) == {
        "munge": [
            "usr/lib/systemd/system/munge.service",
            "usr/lib/x86_64-linux-gnu/libmunge.so.2",
        ],
        "slurm-slurmctld": ["usr/sbin/slurmctld"],
        "slurm-slurmd": ["usr/sbin/slurmd"],
        "slurm": ["usr/lib/x86_64-linux-gnu/slurm-wlm/auth_munge.so", "usr/bin/srun"],
    }


@pytest.fixture
def with_slurm(can_host_lab: None, cli: Run) -> Iterator[str]:
    name = "labslurm"
    cli(name, "down")
    cli(name, "up", "--with", "slurm", "train1")
    yield name
    cli(name, "down")


@pytest.mark.lab
def test_yum_installs_slurm_where_a_host_was_made_with_it(
    with_slurm: str, cli: Run, shell: Run
) -> None:
    config = str(LabPaths.of(with_slurm).ssh_config)

    def on_host(command: str) -> str:
        return shell("ssh", "-F", config, "train1", command).stdout

    on_host("yum install -y munge slurm slurm-slurmctld slurm-slurmd")
    assert on_host("slurmctld -V; slurmd -V").split() == ["slurm-wlm", "22.05.8"] * 2
    assert on_host("stat -c '%U %a' /etc/munge") == "munge 700\n"
    assert "not found" not in on_host("ldd /usr/sbin/slurmd /usr/lib/*/slurm-wlm/*.so")
    refused = cli(with_slurm, "up", "gw1", "--with", "slurm").stdout
    assert "gw1 booted" in refused
