"""A real nginx for measurements, with the gateway's own configuration, beside any other nginx.

Rendered from templates/nginx.conf.j2 as a deploy would; only paths and addresses are other ones.
Where none is installed, Debian's package is unpacked into `.bench/`, which installs nothing.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness import CACHE, CORES, Server, free_port
from provision import rendering
from provision.settings import HostInput, parse_fleet

# Below these everything is the prefix's own, not the system's.
_ROOTS = ("/etc/nginx", "/var/log/nginx", "/usr/share/nginx", "/run")

# Enough for any process here, if the limit can be raised.
_DESCRIPTORS = 65536

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def gateway(folder: Path, ports: Sequence[int], *, sockets: int | None = None) -> Server:
    """nginx in front of the workers on these ports of this machine; `folder` becomes its prefix.

    Has room for so many WebSockets, by default for as many as the settings say.
    """
    port = free_port()
    for directory in ("etc/nginx/conf.d", "var/log/nginx", "usr/share/nginx", "run", "temporary"):
        (folder / directory).mkdir(parents=True)
    (folder / "etc/nginx/mime.types").write_text("types { text/html html; }\n")
    temporary = [f"{name}_temp_path {folder}/temporary/{name};\n" for name in _TEMPORARY]
    (folder / "etc/nginx/conf.d/bench.conf").write_text("".join(temporary))
    configuration = folder / "etc/nginx/nginx.conf"
    room = {} if sockets is None else _room(sockets)
    configuration.write_text(_configuration(folder, port, ports, room))
    command = [_program(), "-p", str(folder), "-c", str(configuration)]
    command += ["-e", f"{folder}/var/log/nginx/error.log", "-g", "daemon off;"]
    return Server(command, port=port)


def descriptor_limit() -> int:
    """How many descriptors a process may have here, once it has raised its own limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):  # root may raise it, unless it was told not to
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, max(limit, _DESCRIPTORS)))
        return _DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return limit


def _room(sockets: int) -> dict[str, int]:
    """Processes enough for twice as many: connections do not come to all in equal numbers."""
    connections = (descriptor_limit() - 512) // 2  # as `sizing.descriptors` has it
    processes = max(len(CORES), -(-2 * 2 * sockets // connections))
    return {"worker_connections": connections, "worker_processes": processes}


def _configuration(folder: Path, port: int, ports: Sequence[int], room: dict[str, int]) -> str:
    here = {"address": "127.0.0.1"}
    hosts = (
        ("gateway", "gateways", {**here, "listen_port": port, **room}),
        ("worker", "workers", {**here, "worker_ports": tuple(ports)}),
    )
    fleet = parse_fleet(
        [HostInput(name=name, groups=frozenset({group}), data=data) for name, group, data in hosts],
        resolve={},
    )
    text = rendering.nginx_conf(fleet.gateways["gateway"], fleet).decode()
    text = text.replace(f"listen {port} ", f"listen 127.0.0.1:{port} ")
    for root in _ROOTS:
        text = re.sub(rf"(?<=[ \t]){root}(?=/)", f"{folder}{root}", text)
    return text


def _program() -> str:
    installed = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    unpacked = CACHE / "nginx" / "usr" / "sbin" / "nginx"
    if installed:
        return installed
    if not unpacked.exists():
        _unpack(unpacked.parents[2])
    return str(unpacked)


def _unpack(folder: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit("nginx is missing; install it as this distribution does, it need not run")
    folder.mkdir(parents=True, exist_ok=True)
    print("==> unpacking nginx into .bench/", flush=True)
    get = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "nginx"]
    if subprocess.run(get, cwd=folder).returncode:
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(get, cwd=folder, check=True)
    package = next(folder.glob("nginx_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
