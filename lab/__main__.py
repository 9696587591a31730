"""The command line of the lab: `python -m lab …`. One short-lived process and thread."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from lab import lab as labs
from lab import layer, names, requirements, vm
from lab.errors import LabError
from lab.network import enter_network
from lab.paths import HOME_VARIABLE, LabPaths
from lab.state import inventory

_DESCRIPTION: Final = """\
Disposable Linux hosts on this machine. Each is a container that boots its own systemd, has its own
address and is reached over SSH; together they are on a network that leads nowhere else.
"""
_EPILOG: Final = f"""\
Host names: gw1 … gw9 have the addresses 10.77.0.11 … 19, gpu1 … gpu9 10.77.0.21 … 29, train1 …
train9 10.77.0.31 … 39; up to nine others have 10.77.0.101 … 109. From this machine they are
127.77.K.11 and so on, SSH on port {names.SSH_PORT} (K is 0 for the default lab).
Everything is kept in /var/lib/gateway-lab, or where {HOME_VARIABLE} says.

The VM (`vm up`) is emulated; {vm.ACCELERATOR_VARIABLE}=kvm is faster where /dev/kvm boots a kernel.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--name", default=names.DEFAULT_LAB, help="which lab (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("check", help="tell whether this machine can host a lab; change nothing")
    commands.add_parser("setup", help="install the tools and build the base image")
    up = commands.add_parser("up", help="start the lab, or add hosts to it")
    up.add_argument(
        "hosts",
        nargs="*",
        metavar="HOST",
        help=f"hosts that must run afterwards (default: {' '.join(names.DEFAULT_HOSTS)})",
    )
    up.add_argument(
        "--gateway-port",
        type=int,
        default=names.DEFAULT_GATEWAY_PORT,
        metavar="PORT",
        help="port of this machine that leads to the gateways' port "
        f"{names.DEFAULT_GATEWAY_PORT} (default: %(default)s)",
    )
    up.add_argument(
        "--with",
        dest="layers",
        action="append",
        default=[],
        choices=layer.NAMES,
        help="what yum offers on hosts that are new, beside the rest (a layer of their disk)",
    )
    commands.add_parser("down", help="end the lab and remove all that its hosts wrote")
    commands.add_parser("status", help="show the lab and its hosts")
    commands.add_parser("gateway", help="print where this machine reaches the first gateway")
    ssh = commands.add_parser("ssh", help="log in to a host, or run a command on it")
    ssh.add_argument("host", metavar="HOST")
    ssh.add_argument("rest", nargs=argparse.REMAINDER, metavar="CMD …")
    execute = commands.add_parser(
        "run", help="run a command of this machine on the network of the hosts"
    )
    execute.add_argument("rest", nargs=argparse.REMAINDER, metavar="CMD …")
    reboot = commands.add_parser("reboot", help="reboot a host and wait until it is back")
    reboot.add_argument("host", metavar="HOST")
    off = commands.add_parser("power-off", help="shut a host down; its disk stays")
    off.add_argument("host", metavar="HOST")
    off.add_argument("--hard", action="store_true", help="pull the plug instead")
    on = commands.add_parser("power-on", help="boot a host that is off")
    on.add_argument("host", metavar="HOST")
    _add_vm_commands(commands.add_parser("vm", help="a virtual machine with SELinux enforcing"))
    return parser


def _add_vm_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="vm_command", required=True, metavar="COMMAND")
    commands.add_parser("setup", help="install the tools and build the VM's image")
    commands.add_parser("up", help="start it")
    commands.add_parser("down", help="end it and remove all that it wrote")
    commands.add_parser("reboot", help="reboot it and wait until it is back")
    ssh = commands.add_parser("ssh", help="log in to it, or run a command on it")
    ssh.add_argument("rest", nargs=argparse.REMAINDER, metavar="CMD …")
    for verb, text in (("save", "keep its state under a name"), ("restore", "back to that state")):
        commands.add_parser(verb, help=text).add_argument("tag", metavar="TAG")


class _Progress:
    """One line per step, with the time since the start."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started_at:5.1f} s] {line}", flush=True)


def _check(_: argparse.Namespace) -> int:
    requirements.require()
    if missing := sorted(set(requirements.missing_tools().values())):
        print(f"this machine can host a lab once `setup` has installed {', '.join(missing)}")
    else:
        print("this machine can host a lab")
    return 0


def _setup(_: argparse.Namespace) -> int:
    progress = _Progress()
    base = labs.setup(progress=progress)
    progress(f"ready: base image {base}")
    return 0


def _up(options: argparse.Namespace) -> int:
    progress = _Progress()
    wanted: Sequence[str] = options.hosts or names.DEFAULT_HOSTS
    state = labs.up(
        options.name,
        wanted,
        gateway_port=options.gateway_port,
        layers=options.layers,
        progress=progress,
    )
    progress(f"the lab {state.name!r} is up")
    return _status(options)


def _down(options: argparse.Namespace) -> int:
    progress = _Progress()
    if labs.down(options.name):
        progress(f"the lab {options.name!r} is gone")
    else:
        progress(f"there is no lab {options.name!r}")
    return 0


def _status(options: argparse.Namespace) -> int:
    found = labs.status(options.name)
    if found is None:
        others = [name for name in labs.all_labs() if name != options.name]
        also = f" (others on this machine: {', '.join(others)})" if others else ""
        print(f"there is no lab {options.name!r}{also}")
        return 1
    print(f"{'HOST':12} {'STATE':8} {'BOOTS':>5}  {'ADDRESS':12}  SSH FROM THIS MACHINE")
    for host in found.hosts:
        print(f"{host.name:12} {host.phase.value:8} {host.boots:5}  {host.address:12}  {host.ssh}")
    gateways = [at for at in found.listening if not at.endswith(f":{names.SSH_PORT}")]
    if gateways:
        print(f"gateway port from this machine: {', '.join(gateways)}")
    if not found.complete:
        print(f"the lab is incomplete; repair it with: {_again(options.name, 'up')}")
        return 1
    print(f"log in with: {_again(options.name, f'ssh {found.hosts[0].name}')}")
    return 0


def _gateway(options: argparse.Namespace) -> int:
    print(labs.gateway(options.name))
    return 0


def _again(name: str, command: str) -> str:
    option = "" if name == names.DEFAULT_LAB else f"--name {name} "
    return f"python -m lab {option}{command}"


def _ssh(options: argparse.Namespace) -> NoReturn:
    found = inventory(options.name)
    if options.host not in found:
        raise LabError(
            f"the lab {options.name!r} has no host {options.host!r}; it has {', '.join(found)}"
        )
    config = LabPaths.of(options.name).ssh_config
    os.execvp("ssh", ["ssh", "-F", str(config), options.host, *_command(options.rest)])  # noqa: S606


def _run(options: argparse.Namespace) -> NoReturn:
    command = _command(options.rest)
    if not command:
        raise LabError("say what to run: python -m lab run CMD …")
    enter_network(labs.controller_namespace(options.name))
    try:
        os.execvp(command[0], command)  # noqa: S606
    except FileNotFoundError:
        raise LabError(f"{command[0]}: command not found") from None


def _command(rest: list[str]) -> list[str]:
    return rest[1:] if rest[:1] == ["--"] else rest


def _reboot(options: argparse.Namespace) -> int:
    progress = _Progress()
    labs.reboot(options.name, options.host)
    progress(f"{options.host} is back")
    return 0


def _power_off(options: argparse.Namespace) -> int:
    progress = _Progress()
    labs.power_off(options.name, options.host, pull_the_plug=options.hard)
    progress(f"{options.host} is off")
    return 0


def _power_on(options: argparse.Namespace) -> int:
    labs.power_on(options.name, options.host, progress=_Progress())
    return 0


def _vm(options: argparse.Namespace) -> int:
    progress = _Progress()
    name = options.name
    match options.vm_command:
        case "setup":
            progress(f"ready: {vm.setup(progress=progress).directory}")
        case "up":
            vm.up(name, progress=progress)
            progress(f"the VM is up; log in with: {_again(name, 'vm ssh')}")
        case "down":
            progress("the VM is gone" if vm.down(name) else "there is no VM")
        case "reboot":
            vm.reboot(name)
            progress("the VM is back")
        case "save":
            vm.save(name, options.tag)
            progress(f"saved as {options.tag}")
        case "restore":
            vm.restore(name, options.tag)
            progress(f"back to {options.tag}")
        case "ssh":
            vm.inventory(name)  # says so where there is none
            command = vm.ssh_command(vm.VmPaths.of(name), *_command(options.rest))
            os.execvp(command[0], command)  # noqa: S606
    return 0


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "check": _check,
    "setup": _setup,
    "up": _up,
    "down": _down,
    "status": _status,
    "gateway": _gateway,
    "ssh": _ssh,
    "run": _run,
    "reboot": _reboot,
    "power-off": _power_off,
    "power-on": _power_on,
    "vm": _vm,
}


def main() -> int:
    options = _parser().parse_args()
    # The hosts' files are made here, and their modes must not depend on the operator's umask.
    os.umask(0o022)
    try:
        return _COMMANDS[options.command](options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next `up` or `down` cleans up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
