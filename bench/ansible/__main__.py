"""The deploy beside an Ansible playbook that does the same: `python -m bench.ansible` (root; lab
hosts).

Two fresh hosts are deployed by each tool; what they rendered is compared byte by byte. Then runs
that have nothing to do, in turns, on two hosts and on twelve. Ansible is installed into
`.bench/ansible/`, with the one collection of its community that the playbook needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

from bench import fleet
from bench.fleet import Hosts
from bench.harness import CACHE, CHECKOUT
from bench.results import Row, write
from gpu_service import bundle
from provision import wheelhouse

_HERE = Path(__file__).parent
_ROOT = CACHE / "ansible"
_BIN = _ROOT / "venv" / "bin"
# What the community's package of that time holds of ansible.posix.
_CORE, _COMMUNITY = "ansible-core==2.19.14", "ansible==12.1.0"
_COLLECTION = "ansible_collections/ansible/posix/"

_GATEWAY_FILES = (
    "/usr/share/nginx/gateway/404.html",
    "/usr/share/nginx/gateway/50x.html",
    "/etc/logrotate.d/nginx",
    "/etc/systemd/system/nginx.service.d/gateway.conf",
)
_NGINX = "/etc/nginx/nginx.conf"
_UNITS = (
    "/etc/systemd/system/gpu-worker@.service",
    "/etc/systemd/system/gpu-worker@.socket",
)
_PORTS = (9005, 9006)


def install() -> None:
    """Ansible, in an environment of its own, once."""
    if (_ROOT / ".complete").exists():
        return
    print(f"==> installing {_CORE} into .bench/ansible/", flush=True)
    venv.create(_ROOT / "venv", with_pip=True)
    pip = [str(_BIN / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", _CORE], check=True)
    wheels = _ROOT / "wheels"
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(wheels), _COMMUNITY], check=True)
    with zipfile.ZipFile(next(wheels.glob("ansible-*.whl"))) as community:
        names = [name for name in community.namelist() if name.startswith(_COLLECTION)]
        community.extractall(_ROOT / "collections", names)
    (_ROOT / ".complete").touch()


class Playbook:
    """The playbook, for hosts whose declared files were read from where the deploy put them."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts = hosts
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take_files(self) -> None:
        """What the deploy rendered, as the playbook's own files."""
        for name in self._hosts.found:
            for path, text in self._rendered(name).items():
                target = self._folder / name / path.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)

    def differences(self) -> list[str]:
        """Files on the hosts that are not what the deploy rendered."""
        return [
            f"{name}:{path}"
            for name in self._hosts.found
            for path, text in self._rendered(name).items()
            if (self._folder / name / path.lstrip("/")).read_text() != text
        ]

    def _rendered(self, name: str) -> dict[str, str]:
        paths = (_NGINX, *_GATEWAY_FILES) if name.startswith("gw") else (*_UNITS, *self._settings)
        return {path: self._hosts.on(name, shlex.join(["cat", path])) for path in paths}

    @property
    def _settings(self) -> list[str]:
        return [f"/etc/gpu-service/worker-{port}.env" for port in _PORTS]

    def run(self) -> tuple[float, str]:
        """Seconds of one run, and what it said. Ends the measurement if it failed."""
        inventory, variables = self._write()
        command = [str(_BIN / "ansible-playbook"), "-i", str(inventory), "-e", f"@{variables}"]
        environ = {
            **fleet.shell(),
            "ANSIBLE_CONFIG": str(_HERE / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(_ROOT / "collections"),
            "LC_ALL": "C.UTF-8",
        }
        started = time.perf_counter()
        result = subprocess.run(
            [*command, str(_HERE / "playbook.yml")], env=environ, capture_output=True, text=True
        )
        took = time.perf_counter() - started
        if result.returncode:
            sys.exit(result.stdout[-6000:] + result.stderr[-2000:])
        return took, result.stdout

    def _write(self) -> tuple[Path, Path]:
        config = next(iter(self._hosts.found.values()))["ssh_config_file"]
        inventory = self._folder / "inventory.ini"
        groups = {"gateways": "gw", "workers": "gpu"}
        lines = [
            line
            for group, prefix in groups.items()
            for line in (f"[{group}]", *(n for n in self._hosts.found if n.startswith(prefix)))
        ]
        # As Ansible connects by itself, and the lab's addresses and keys.
        arguments = f"-F {config} -o ControlMaster=auto -o ControlPersist=60s"
        lines += ["[all:vars]", "ansible_user=root", f"ansible_ssh_args={arguments}"]
        inventory.write_text("\n".join(lines) + "\n")
        variables = self._folder / "variables.json"
        variables.write_text(json.dumps(self._variables()))
        return inventory, variables

    def _variables(self) -> dict[str, object]:
        worker = next(name for name in self._hosts.found if name.startswith("gpu"))
        text = (self._folder / worker / self._settings[0].lstrip("/")).read_text()
        said = dict(line.split("=", 1) for line in text.splitlines())
        release = Path(said["PYTHONPATH"])
        source = wheelhouse.find(
            wheelhouse.Target(build="cpu", python="3.11", machine=platform.machine(), packages=())
        )
        return {
            "files_dir": str(self._folder),
            "gateway_files": _GATEWAY_FILES,
            "gateway_addresses": [
                host["address"] for name, host in self._hosts.found.items() if name.startswith("gw")
            ],
            "worker_ports": _PORTS,
            "python": "/usr/bin/python3.11",
            "python_package": "python3.11",
            "wheels_dir": str(source.wheels[0].parent),
            "environment_dir": str(Path(said["GPU_WORKER_PYTHON"]).parents[1]),
            "release_dir": str(release),
            "release_archive": str(self._archive(release.name)),
            "model_source": str(self._hosts.model),
            "model_name": bundle.read_manifest(self._hosts.model).name,
            "model_dir": said["GPU_SERVICE_BUNDLE"],
        }

    def _archive(self, name: str) -> Path:
        """The package as the deploy unpacks it: DIGEST/gpu_service."""
        archive = self._folder / f"{name}.tar.gz"
        if not archive.exists():
            command = ["tar", "-czf", str(archive), "--exclude=__pycache__"]
            command += [f"--transform=s,^,{name}/,", "-C", str(CHECKOUT), "gpu_service"]
            subprocess.run(command, check=True)
        return archive


def no_ops(hosts: Hosts, playbook: Playbook, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of runs that have nothing to do, ours and Ansible's, in turns."""
    ours, theirs = [], []
    for _ in range(runs):
        outcome = hosts.run()
        if outcome.returncode or outcome.changed:
            sys.exit(f"the deploy failed or changed something:\n{outcome.output}")
        ours.append(outcome.seconds)
        took, said = playbook.run()
        if "changed=0" not in said or any(f"changed={n}" in said for n in range(1, 10)):
            sys.exit(f"the playbook changed something:\n{said}")
        theirs.append(took)
    return ours, theirs


def first_deploys() -> tuple[float, float]:
    """Seconds of the first deploy of two fresh hosts by each; both leave the same files."""
    with fleet.fresh("gw1", "gpu1") as hosts:
        outcome = hosts.run()
        if outcome.returncode:
            sys.exit(outcome.output)
        playbook = Playbook(hosts, _ROOT / "first")
        playbook.take_files()
    with fleet.fresh("gw1", "gpu1") as hosts:
        playbook = Playbook(hosts, _ROOT / "first")
        theirs, _ = playbook.run()
        if different := playbook.differences():
            sys.exit(f"the playbook left something else: {', '.join(different)}")
    return outcome.seconds, theirs


def settled(names: list[str], runs: int) -> tuple[float, float]:
    """Medians of no-op runs on hosts of these names, ours and Ansible's."""
    with fleet.hosts(*names) as hosts:
        playbook = Playbook(hosts, _ROOT / f"{len(names)}")
        playbook.take_files()
        playbook.run()
        hosts.run()
        ours, theirs = no_ops(hosts, playbook, runs)
    return statistics.median(ours), statistics.median(theirs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ansible", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="no-op runs of each")
    parser.add_argument("--gateways", type=int, default=6, help="of the twelve")
    parts = ["first", "2", "12"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    install()
    holds = [
        write("deploy", f"python -m bench.ansible --parts {part}", measured(part, options))
        for part in options.parts
    ]
    return 0 if all(holds) else 1


def measured(part: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one part, which may be measured without the others."""
    if part == "first":
        ours, theirs = first_deploys()
        return _rows("first deploy, 2 hosts", ours, theirs, at_least=2.0)
    if part == "2":
        ours, theirs = settled(["gw1", "gpu1"], options.runs)
        return _rows("no-op deploy, 2 hosts", ours, theirs, at_least=4.0, at_most=4.0)
    names = [f"gw{n}" for n in range(1, options.gateways + 1)]
    names += [f"gpu{n}" for n in range(1, 13 - options.gateways)]
    ours, theirs = settled(names, options.runs)
    return _rows("no-op deploy, 12 hosts", ours, theirs, at_least=4.0, at_most=8.0)


def _rows(
    name: str, ours: float, theirs: float, *, at_least: float, at_most: float | None = None
) -> list[Row]:
    return [
        Row(name=f"{name}", value=ours, unit="s", at_most=at_most),
        Row(name=f"{name}: Ansible", value=theirs, unit="s"),
        Row(name=f"{name}: times as fast", value=theirs / ours, unit="", at_least=at_least),
    ]


if __name__ == "__main__":
    sys.exit(main())
