"""Worker hosts: interpreter, environment, service, model, units; then rolled one by one.

On the host:

    /opt/gpu-service/venvs/DIGEST/      virtual environment, named by its lock's digest
    /opt/gpu-service/releases/DIGEST/   the gpu_service package, named by its content
    /var/lib/gpu-service/models/…       bundles (provision/models.py)
    /etc/gpu-service/worker-PORT.env    settings of one worker
    /etc/gpu-service/tokens[-SERVICE]   SHA-256 of the tokens that may connect, if they are needed
    /etc/systemd/system/gpu-worker@.service, gpu-worker@.socket
    /run/gpu-workers/PORT.sock          for the nginx of the same host (/etc/tmpfiles.d)
    /run/gpu-service-PORT/control.sock  what `python -m gpu_service models` speaks to

Environments, releases and bundles never change once complete. A worker's settings file names
all three by their versions, so swapping that file in is the one step that switches it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from pyinfra import host, logger
from pyinfra.api import StringCommand, deploy, operation
from pyinfra.api.exceptions import DeployError

from provision import compiled, facts, models, operations, preflight, record, rendering, wheelhouse
from provision.facts import Hardware, quoted, script
from provision.models import Model
from provision.operations import Commands, ManagedFile, Roll, WorkerUnit
from provision.rendering import CHECKOUT
from provision.rolling import Rollout
from provision.settings import (
    SERVICE_STATE,
    SOCKETS,
    UNITS,
    Assignment,
    Fleet,
    PythonSettings,
    WorkerSettings,
    unix_socket,
)

OPT = "/opt/gpu-service"
ETC = "/etc/gpu-service"
UNIT_FILE = f"{UNITS}/gpu-worker@.service"
SOCKET_FILE = f"{UNITS}/gpu-worker@.socket"
TOKENS = f"{ETC}/tokens"
TMPFILES = "/etc/tmpfiles.d/gpu-workers.conf"

# The service makes sockets there; nginx's group, which they get, may enter; nobody else may.
SOCKETS_MODE = "2750"


def tokens_path(service: str) -> str:
    """Where the tokens of a service lie on its hosts."""
    return f"{TOKENS}-{service}" if service else TOKENS


def unit(port: int) -> str:
    return f"gpu-worker@{port}.service"


def settings_path(port: int) -> str:
    return f"{ETC}/worker-{port}.env"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment to be: where its packages come from, and its place on the host."""

    python: str
    digest: str
    wheels: tuple[ManagedFile, ...]
    requirements: bytes
    pip_conf: bytes | None = field(repr=False)  # may hold a token
    # The wheel of uv, by which all of it comes from `wheels`; None: pip on the host downloads the
    # rest.
    installer: ManagedFile | None

    @property
    def folder(self) -> str:
        return f"{OPT}/venvs/{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Release:
    """The gpu_service package as an archive, and its place on the host.

    Its compiled part, where it has one, is in the archive, beside the sources.
    """

    content: bytes = field(repr=False)  # a tar archive
    digest: str
    compiled: bool = False

    @cached_property
    def archive(self) -> bytes:
        """As it is uploaded; packed only where a host lacks it, since that takes a while."""
        return gzip.compress(self.content, mtime=0)

    @property
    def folder(self) -> str:
        return f"{OPT}/releases/{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the workers of one host are made of."""

    hardware: Hardware
    environment: Environment
    release: Release
    models: Mapping[str, Model]  # of each service that the host runs

    @property
    def bundles(self) -> list[Model]:
        """The models, each once."""
        return list(dict.fromkeys(self.models.values()))

    @property
    def python(self) -> str:
        return f"{self.environment.folder}/bin/python"


# One run is one process: its hosts share what went wrong in a rolling restart.
_ROLLOUT = Rollout()


def plan(settings: WorkerSettings, fleet: Fleet) -> Plan:
    """What the current host's workers are made of. Raises `DeployError`; touches nothing."""
    hardware = host.get_fact(facts.HostHardware)
    return Plan(
        hardware=hardware,
        environment=choose_environment(settings, hardware),
        release=choose_release(settings, hardware),
        models={
            found.service: models.load(preflight.bundle_folder(found.settings.model))
            for found in fleet.assignments(settings)
        },
    )


@deploy("Worker")
def worker(settings: WorkerSettings, fleet: Fleet, planned: Plan) -> None:
    """Bring one worker host to its declared state, and its workers to ready."""
    install(settings, planned.environment, planned.release)
    for model in operations.each(planned.bundles):
        models.upload(name=f"Model {model.name} {model.version} is on the host", model=model)
    if local := fleet.local_gateway(settings):
        sockets_folder(
            name="Folder of the sockets for nginx",
            user=settings.service_user,
            group=local.nginx_user,
        )
    templates = unit_files(settings, fleet, planned)
    operations.place_files(name="Units of the workers", files=templates)
    tokens = [tokens_file(a) for a in fleet.assignments(settings) if a.settings.worker_tokens]
    if tokens:
        operations.place_files(name="Tokens that may connect", files=tokens)
    operations.firewalld(
        name="Worker ports are open to the gateways only",
        role="worker",
        ports_from=admitted(settings, fleet),
        # A port that goes is in use until the gateways have moved on.
        closes=False,
    )
    units = worker_units(settings, fleet, planned, templates)
    operations.start_workers(
        name="Workers that were down run what was declared", workers=units, rollout=_ROLLOUT
    )
    for turn in operations.each(list(fleet.workers)):
        if turn == host.name:
            operations.roll_workers(
                name="Workers run what was declared, one after the other",
                workers=units,
                rollout=_ROLLOUT,
                roll=roll(settings, fleet),
            )
    # Of two versions of a model, each a service's, the first service's is the current one.
    for model in operations.each(list({m.name: m for m in reversed(planned.bundles)}.values())):
        operations.link(
            name=f"Model {model.name} {model.version} is current",
            path=model.link,
            target=model.version,
        )


@deploy("Worker rollback")
def previous(settings: WorkerSettings, fleet: Fleet) -> None:
    """Back to what the workers of this host ran before their last change."""
    for turn in operations.each(list(fleet.workers)):
        if turn == host.name:
            operations.previous_workers(
                name="Workers run what they ran before, one after the other",
                units={unit(port): settings_path(port) for port in fleet.ports(settings)},
                rollout=_ROLLOUT,
                roll=roll(settings, fleet),
            )


def roll(settings: WorkerSettings, fleet: Fleet) -> Roll:
    """What the rolling restart of a host's workers keeps to."""
    capacity: dict[str, dict[str, int]] = {}
    for name, worker in fleet.workers.items():
        for found in fleet.assignments(worker):
            weight = 0 if found.settings.backup else found.settings.weight
            of_host = {f"{name}:{port}": weight for port in found.settings.ports}
            capacity.setdefault(found.service, {}).update(of_host)
    return Roll(
        min_up=settings.min_up,
        capacity=capacity,
        gateways={name: fleet.places(gateway) for name, gateway in fleet.gateways.items()},
        fail_timeout_s=max(g.upstream_fail_timeout_s for g in fleet.gateways.values()),
    )


@deploy("Worker clean-up")
def retire(settings: WorkerSettings, fleet: Fleet, planned: Plan) -> None:
    """After the gateways have moved on: what is no longer declared stops and goes."""
    operations.retire_workers(
        name="No other workers", keep=fleet.ports(settings), settings_file=settings_path
    )
    operations.firewalld(
        name="No other worker ports are open",
        role="worker",
        ports_from=admitted(settings, fleet),
    )
    forget_unused(
        name="Nothing is left that nobody reads or opens",
        sockets_are_used=fleet.local_gateway(settings) is not None,
    )
    prune(
        name=f"At most {settings.keep_versions} versions are kept",
        folders=[
            f"{OPT}/venvs",
            f"{OPT}/releases",
            *dict.fromkeys(model.parent for model in planned.bundles),
        ],
        keep=settings.keep_versions,
    )


def admitted(settings: WorkerSettings, fleet: Fleet) -> dict[int | str, list[str]]:
    """Who may connect to which port of a worker host."""
    addresses = [*fleet.gateway_addresses(), *settings.metrics_from]
    return dict.fromkeys(fleet.ports(settings), addresses)


@operation()
def sockets_folder(user: str, group: str) -> Commands:
    """The folder of Unix sockets, now and after each boot.

    + user: makes the sockets
    + group: may open them; they get it from the folder
    """
    line = f"d {SOCKETS} {SOCKETS_MODE} {user} {group}\n"
    conf = ManagedFile(path=TMPFILES, content=line.encode())
    found = host.get_fact(facts.FolderStates, paths=(SOCKETS,))
    yield from operations.place_files._inner(files=[conf])
    if found.get(SOCKETS) != (SOCKETS_MODE, user, group):
        # Sockets that are there already have the group that the folder had.
        yield script(
            'systemd-tmpfiles --create "$1" && find "$2" -type s -exec chgrp "$3" {} +',
            conf.path,
            SOCKETS,
            group,
        )


def install(settings: PythonSettings, environment: Environment, release: Release) -> None:
    """Interpreter, user, environment and package: what workers and trainers have in common."""
    record.packages(name="Python is installed", packages=[settings.python_package])
    record.user(  # noqa: S604  `shell` is the user's login shell
        name="Service user",
        user=settings.service_user,
        system=True,
        home=SERVICE_STATE,
        ensure_home=False,
        shell="/sbin/nologin",
    )
    operations.directories(
        name="Folders",
        paths={
            OPT: ("755", "root"),
            f"{OPT}/wheels": ("755", "root"),
            f"{OPT}/venvs": ("755", "root"),
            f"{OPT}/releases": ("755", "root"),
            ETC: ("755", "root"),
            SERVICE_STATE: ("755", "root"),
            models.ROOT: ("755", "root"),
        },
    )
    install_environment(name="Virtual environment", environment=environment)
    install_release(
        name="gpu_service package", release=release, python=f"{environment.folder}/bin/python"
    )


def choose_environment(settings: WorkerSettings, hardware: Hardware) -> Environment:
    """Which wheels this host gets. Raises `DeployError` before anything is touched."""
    if settings.worker_device == "cuda" and not hardware.nvidia_gpus:
        raise DeployError(
            f"{host.name}: worker_device is 'cuda', but no NVIDIA driver serves a GPU there "
            "(/proc/driver/nvidia/gpus is empty); install the driver or set worker_device='auto'"
        )
    return environment_for(
        settings,
        hardware,
        uses_gpu=uses_gpu(settings, hardware),
        packages=settings.worker_packages,
    )


def environment_for(
    settings: PythonSettings, hardware: Hardware, *, uses_gpu: bool, packages: tuple[str, ...] = ()
) -> Environment:
    """The environment of a host that does or does not use GPUs; `packages`: beside the service's.

    Raises `DeployError`.
    """
    build = settings.torch_build
    if build == "auto":
        build = "cuda" if uses_gpu else "cpu"
    if settings.packages_from == "index":
        return _from_index(settings, build, packages)
    target = wheelhouse.Target(
        build=build,
        python=_python_version(settings),
        machine=hardware.machine,
        packages=packages,
    )
    try:
        return _from_wheelhouse(settings, wheelhouse.find(target))
    except wheelhouse.WheelhouseError as error:
        raise DeployError(f"{host.name} ({build}): {error}") from None


def _python_version(settings: PythonSettings) -> str:
    version = re.search(r"(3\.\d+)", settings.python)
    return version.group(1) if version else "3.11"


def uses_gpu(settings: WorkerSettings, hardware: Hardware) -> bool:
    return settings.worker_device != "cpu" and hardware.nvidia_gpus > 0


def _from_wheelhouse(settings: PythonSettings, source: wheelhouse.Wheelhouse) -> Environment:
    assert source.installer, "what is for hosts is found with it"
    return Environment(
        python=settings.python,
        digest=source.digest,
        wheels=_wheels(source),
        requirements=source.lock.encode(),
        pip_conf=None,
        installer=_uploaded(source.installer),
    )


@cache
def _wheels(source: wheelhouse.Wheelhouse) -> tuple[ManagedFile, ...]:
    """The same objects for every host: gigabytes are hashed once a run, not once a host."""
    return tuple(_uploaded(path) for path in source.wheels)


def _uploaded(wheel: Path) -> ManagedFile:
    return ManagedFile(path=f"{OPT}/wheels/{wheel.name}", content=wheel)


def _from_index(settings: PythonSettings, build: str, packages: tuple[str, ...]) -> Environment:
    lines = ["[global]"]
    if settings.index_url:
        lines.append(f"index-url = {settings.index_url.get_secret_value()}")
    if settings.torch_index_url:
        lines.append(f"extra-index-url = {settings.torch_index_url.get_secret_value()}")
    if settings.index_trusted_host:
        lines.append(f"trusted-host = {settings.index_trusted_host}")
    files = [package for package in packages if package.endswith(".whl")]
    wheels = tuple(_uploaded(CHECKOUT / path) for path in files)
    own = [*sorted(set(packages) - set(files)), *(w.path for w in wheels)]
    requirements = wheelhouse.REQUIREMENTS.read_bytes() + "".join(f"{p}\n" for p in own).encode()
    parts = [requirements.decode(), build, settings.python, *(wheel.sha256 for wheel in wheels)]
    return Environment(
        python=settings.python,
        digest=hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16],
        wheels=wheels,
        requirements=requirements,
        pip_conf="\n".join([*lines, ""]).encode(),
        installer=None,
    )


# What importing the service leaves alone, and training does not: a third of what there is.
_NOT_IMPORTED = "/(sympy|mpmath|networkx|setuptools|pip)/|/torch/(_dynamo|_inductor|onnx)/"
# Of packages' own tests nobody runs any.
_TESTS = "/tests/|/testing/_internal/"

# By pip, which asks an index. $1: pip.conf; $2: the folder; then what to install.
_BY_PIP = """
export PIP_CONFIG_FILE="$1" PIP_DISABLE_PIP_VERSION_CHECK=1
folder=$2
shift 2
"$folder/bin/python" -m pip install --quiet --no-compile --no-cache-dir "$@" &&
    "$folder/bin/python" -m pip check
"""

# By uv, from wheels alone. $1: its wheel; $2: the folder; $3: the folder of the wheels; then what
# to install. Its cache is on the same file system: what it unpacks is linked, not copied.
_BY_UV = """
export UV_NO_CONFIG=1 UV_OFFLINE=1 UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR="$3/.cache"
python=$2/bin/python wheels=$3
"$python" -m zipfile -e "$1" "$wheels/.installer" || exit 1
uv=$(echo "$wheels"/.installer/uv-*.data/scripts/uv)
chmod 700 "$uv" || exit 1
shift 3
"$uv" pip install --quiet --python "$python" --no-index --find-links "$wheels" \
    --require-hashes "$@" && "$uv" pip check --quiet --python "$python" || exit 1
rm -f "${python%/bin/python}/.lock"  # anybody may write to it
"""


@operation()
def install_environment(environment: Environment) -> Commands:
    """The virtual environment, complete or not at all; wheels checked by SHA-256 once more by what
    installs them.

    Made in place, since an environment can't be moved; it counts only once its marker is
    there, and is made anew where a run was cut.
    """
    complete = f"{environment.folder}/.complete"
    if complete in host.get_fact(facts.Paths, paths=(complete,)):
        return
    folder = f"{OPT}/wheels"
    lock = ManagedFile(path=f"{folder}/requirements.lock", content=environment.requirements)
    installer = environment.installer
    wheels = (*environment.wheels, *([installer] if installer else []))
    yield from operations.place_files._inner(files=wheels, verified=True)
    yield from operations.place_files._inner(files=[lock])
    create = (environment.python, "-m", "venv", "--clear")
    what = ("--requirement", lock.path)
    if installer is not None:
        yield quoted(*create, "--without-pip", environment.folder)
        yield script(_BY_UV, installer.path, environment.folder, folder, *what)
    else:
        conf = "/dev/null"
        if environment.pip_conf is not None:
            conf = f"{folder}/pip.conf"
            secret = ManagedFile(path=conf, content=environment.pip_conf, mode="600", secret=True)
            yield from operations.place_files._inner(files=[secret])
        yield quoted(*create, environment.folder)
        yield script(_BY_PIP, conf, environment.folder, *what)
    yield _compiled(environment.folder, f"{_TESTS}|{_NOT_IMPORTED}", complete)
    # They take as much room again as what was installed from them.
    yield script('rm -rf -- "$1"/* "$1"/.[!.]*', folder)


@operation()
def compile_environment(environment: Environment) -> Commands:
    """All of it is compiled, as training imports nearly all."""
    compiled_whole = f"{environment.folder}/.compiled"
    if compiled_whole not in host.get_fact(facts.Paths, paths=(compiled_whole,)):
        yield _compiled(environment.folder, _TESTS, compiled_whole)


def _compiled(folder: str, but: str, marker: str) -> StringCommand:
    """Modules compiled by all cores, since the service's user can't write there later. Packages
    hold files that don't compile on purpose, so what compileall says decides nothing.
    """
    return script(
        '"$1/bin/python" -m compileall -q -j 0 -x "$2" "$1/lib" >/dev/null; touch "$3"',
        folder,
        but,
        marker,
    )


@operation()
def install_release(release: Release, python: str) -> Commands:
    """The package's folder: unpacked beside, tried, then renamed.

    + python: that will run it. What is compiled, but does not load there, is left out.
    """
    if release.folder in host.get_fact(facts.Paths, paths=(release.folder,)):
        return
    archive = ManagedFile(path=f"{OPT}/releases/.{release.digest}.tar.gz", content=release.archive)
    yield from operations.place_files._inner(files=[archive], verified=True)
    yield script(
        'rm -rf "$2" && mkdir "$2" && tar -xzf "$1" -C "$2" --no-same-owner && '
        'if [ "$5" = yes ] && ! PYTHONPATH="$2" "$4" -P -B -c "import gpu_service.session"; then '
        'echo "the compiled part does not load here: the sources are run" >&2; '
        "find \"$2\" -name '*.so' -delete; fi && "
        'mv -T "$2" "$3" && rm -f "$1"',
        archive.path,
        f"{OPT}/releases/.{release.digest}.partial",
        release.folder,
        python,
        "yes" if release.compiled else "no",
    )


def choose_release(settings: WorkerSettings, hardware: Hardware) -> Release:
    """The package for this host, compiled or not. Raises `DeployError`; touches nothing."""
    if settings.worker_compiled == "no":
        return build_release()
    python = _python_version(settings)
    folder = compiled.find(python=python, machine=hardware.machine)
    if folder is None and settings.worker_compiled == "yes":
        if not compiled.has_compiler():
            raise DeployError(
                f"{host.name}: worker_compiled: what was compiled is found by the version of mypy, "
                "which is not installed on this machine: .venv/bin/pip install -r "
                "requirements/dev.txt, or set worker_compiled = 'auto'"
            )
        raise DeployError(
            f"{host.name}: worker_compiled: nothing is compiled of these sources for Python "
            f"{python} on {hardware.machine}; on a machine with both: "
            ".venv/bin/python -m provision.compiled"
        )
    if compiled.is_outdated(python=python, machine=hardware.machine):
        _warn_of_sources()
    return build_release(folder)


@cache
def _warn_of_sources() -> None:
    """Once a run, not for each host."""
    logger.warning(
        "worker_compiled: the sources have changed since they were compiled, so workers run them "
        "as they are, which is slower; before a deploy: .venv/bin/python -m provision.compiled"
    )


@cache
def build_release(compiled_part: Path | None = None) -> Release:
    """The package of this checkout, archived so that equal sources give equal bytes.

    The digest is of the sources, and of what was compiled by its name alone: two compilers'
    results do the same.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted((CHECKOUT / "gpu_service").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                _add(archive, path, str(path.relative_to(CHECKOUT)))
        identity = hashlib.sha256(buffer.getvalue())
        if compiled_part is not None:
            identity.update(compiled_part.name.encode())
            for path in sorted(compiled_part.iterdir()):
                _add(archive, path, f"gpu_service/{path.name}")
    return Release(
        content=buffer.getvalue(),
        digest=identity.hexdigest()[:16],
        compiled=compiled_part is not None,
    )


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = path.stat().st_size, 0o644, 0
    with path.open("rb") as file:
        archive.addfile(member, file)


def unit_files(settings: WorkerSettings, fleet: Fleet, planned: Plan) -> list[ManagedFile]:
    """The template units of all workers of a host: service, socket.

    Both are there whether or not sockets are kept: going back may need the other way.
    """
    # The host itself has the address that it listens on; where that is any, loopback is enough.
    listen = [] if settings.listens_everywhere else [settings.worker_listen]
    clients = [*fleet.gateway_addresses(), *listen, *settings.metrics_from]
    collectors = [found.settings.collector_address for found in fleet.assignments(settings)]
    service = rendering.render(
        "gpu-worker@.service.j2",
        settings_dir=ETC,
        allowed_addresses=[*clients, *dict.fromkeys(filter(None, collectors))],
        has_gpu=uses_gpu(settings, planned.hardware),
        **rendering.unit_values(settings, fleet),
    )
    socket = rendering.render(
        "gpu-worker@.socket.j2",
        allowed_addresses=clients,
        **rendering.unit_values(settings, fleet),
    )
    return [
        ManagedFile(path=UNIT_FILE, content=service),
        ManagedFile(path=SOCKET_FILE, content=socket),
    ]


def tokens_file(assignment: Assignment) -> ManagedFile:
    """The tokens that may connect, for the service alone to read."""
    settings = assignment.settings
    assert settings.worker_tokens, "asked for only where tokens are needed"
    return ManagedFile(
        path=tokens_path(assignment.service),
        content=(CHECKOUT / settings.worker_tokens).read_bytes(),
        mode="640",
        group=settings.service_user,
        secret=True,
    )


@operation()
def forget_unused(*, sockets_are_used: bool) -> Commands:
    """Tokens go when no worker reads them any more, nor would when it went back; the folder of Unix
    sockets, when this host's nginx has moved on.
    """
    folder = posixpath.dirname(TMPFILES)
    found = host.get_fact(facts.NewestFirst, paths=(ETC, folder))
    tokens = [n for n in found.get(ETC, []) if n == "tokens" or n.startswith("tokens-")]
    there = sorted(f"{ETC}/{name}" for name in tokens)
    read = host.get_fact(facts.WorkerPaths, folder=ETC) if there else frozenset()
    for path in there:
        if path not in read:
            yield quoted("rm", "-f", "--", path)
    if not sockets_are_used and posixpath.basename(TMPFILES) in found.get(folder, []):
        yield quoted("rm", "-rf", "--", SOCKETS, TMPFILES)


def worker_units(
    settings: WorkerSettings, fleet: Fleet, planned: Plan, templates: Iterable[ManagedFile]
) -> list[WorkerUnit]:
    """The workers of this host, service by service, in the order in which they are switched."""
    files = "".join(managed.sha256 for managed in templates)
    places = [(a, port) for a in fleet.assignments(settings) for port in a.settings.ports]
    return [
        _worker_unit(
            assignment,
            port,
            fleet,
            planned,
            files,
            device=device(index, settings, planned.hardware),
            threads=threads(len(places), planned.hardware),
        )
        for index, (assignment, port) in enumerate(places)
    ]


def _worker_unit(
    assignment: Assignment,
    port: int,
    fleet: Fleet,
    planned: Plan,
    unit_files: str,
    *,
    device: str,
    threads: int,
) -> WorkerUnit:
    settings, model = assignment.settings, planned.models[assignment.service]
    keeps_socket = fleet.keeps_sockets(assignment)
    options = {
        "bundle": model.folder,
        "host": settings.worker_listen,
        "port": port,
        "device": device,
        "threads": threads,
        "worker": f"{host.name}:{port}",
        "unix_socket": unix_socket(port) if fleet.local_gateway(settings) else "",
        "control": f"/run/gpu-service-{port}/control.sock",
        "tokens_file": tokens_path(assignment.service) if settings.worker_tokens else "",
        # nginx says in X-Real-IP who its client is.
        "trusted_proxies": ",".join(fleet.gateway_addresses()),
        **settings.service_options,
    }
    values = {
        "GPU_WORKER_PYTHON": planned.python,
        "GPU_WORKER_SOCKET": "systemd" if keeps_socket else "worker",
        "PYTHONPATH": planned.release.folder,
        **{_variable(name): value for name, value in options.items()},
    }
    text = "".join(f"{name}={env_quoted(value)}\n" for name, value in values.items())
    # What the worker is made of, besides this file: a change of any part restarts it.
    parts = [text, unit_files, model.digest]
    deployment = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    content = f"{text}{_variable('deployment')}={deployment}\n".encode()
    return WorkerUnit(
        name=unit(port),
        settings=ManagedFile(path=settings_path(port), content=content),
        deployment=deployment,
        keeps_socket=keeps_socket,
        worker=f"{host.name}:{port}",
        service=assignment.service,
        weight=0 if settings.backup else settings.weight,
    )


def _variable(option: str) -> str:
    return f"GPU_SERVICE_{option.upper()}"


def env_quoted(value: object) -> str:
    """For systemd's EnvironmentFile. https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html#EnvironmentFile="""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./:-]*", text):
        return text
    escaped = re.sub(r'(["\\$`])', r"\\\1", text)
    return f'"{escaped}"'


def device(index: int, settings: WorkerSettings, hardware: Hardware) -> str:
    """Device of the worker number `index` of a host: one GPU each, by the driver's numbering.

    More workers than GPUs share them in turn.
    """
    if not uses_gpu(settings, hardware):
        return "cpu"
    return f"cuda:{index % hardware.nvidia_gpus}"


def threads(workers: int, hardware: Hardware) -> int:
    """Intra-op threads of each of the host's workers: the cores shared out, at least one."""
    return max(1, hardware.cpu_cores // workers)


@operation()
def prune(folders: Iterable[str], keep: int) -> Commands:
    """Remove old versions, oldest first; what a worker runs or can go back to is never removed.

    + folders: each holds one entry per version
    + keep: entries kept per folder, those that are named by settings files included
    """
    folders = tuple(folders)
    named = host.get_fact(facts.WorkerPaths, folder=ETC)
    found = host.get_fact(facts.NewestFirst, paths=folders)
    for folder in folders:
        entries = [name for name in found.get(folder, []) if name != models.CURRENT]
        in_use = [
            n for n in entries if any(f"{path}/".startswith(f"{folder}/{n}/") for path in named)
        ]
        others = [name for name in entries if name not in in_use]
        for name in others[max(0, keep - len(in_use)) :]:
            yield quoted("rm", "-rf", "--", f"{folder}/{name}")
