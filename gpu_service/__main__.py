"""The command line: `python -m gpu_service COMMAND`.

Owns parsing and exit codes (0 done, 1 failed, 2 used wrongly). Imports what a command needs
only when it runs: torch for `serve`, on the inference thread, and for `bundle`.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_service import settings

if TYPE_CHECKING:
    import ssl

    from gpu_service.device import Engine

_DESCRIPTION = "Serve models over WebSocket, ask one that is served, and bring your own."
_BUNDLE = "a version's folder, or the model's for its newest version"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the process's own); its exit code."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if options.command == "serve":
        return _serve(options, unknown)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if options.command == "settings":
        print(settings.reference(), end="")
        return 0
    if options.command == "token":
        return _token(options)
    if options.command in ("bundle", "inspect", "compare"):
        return _bundle(options)
    if options.command == "models":
        return _models(options)
    return _ask(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_service", description=_DESCRIPTION, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve the model of a bundle until SIGTERM",
        description="Every option can be given as GPU_SERVICE_OPTION in the environment, too.",
        allow_abbrev=False,
    )
    settings.add_options(serve)

    commands.add_parser("settings", help="print the reference of all settings of `serve`")

    predict = commands.add_parser("predict", help="send samples and print the predictions")
    predict.add_argument("url", metavar="URL", help="ws://HOST:PORT of a gateway or a worker")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, metavar="DIR", help=f"its test samples; {_BUNDLE}")
    source.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".npy arrays of one sample or many, 8-bit PNG or PGM images; -: standard input",
    )
    predict.add_argument("--count", type=_count, metavar="N", help="how many; default: each once")
    predict.add_argument("--json", action="store_true", help="one JSON object a line, for programs")

    verify = commands.add_parser("verify", help="compare what workers answer with a bundle")
    verify.add_argument("urls", nargs="+", metavar="URL", help="ws://HOST:PORT of each")
    verify.add_argument("--bundle", type=Path, required=True, metavar="DIR", help=_BUNDLE)
    verify.add_argument("--timeout-s", type=_positive, default=10.0, metavar="S")

    load = commands.add_parser("load", help="send many requests and measure the answers")
    _add_load(load)
    for command in (predict, verify, load):
        command.add_argument(
            "--token-file",
            type=Path,
            metavar="FILE",
            help="holds the token, where the server asks for one; default: GPU_SERVICE_TOKEN in "
            "the environment",
        )
        _add_tls(command)

    _add_bundle(commands.add_parser("bundle", help="make a bundle of a model of your own"))

    inspect = commands.add_parser("inspect", help="print what a bundle is, and check its files")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help=_BUNDLE)

    compare = commands.add_parser("compare", help="print what differs between two bundles")
    compare.add_argument("before", type=Path, metavar="BEFORE", help=_BUNDLE)
    compare.add_argument("after", type=Path, metavar="AFTER", help=_BUNDLE)

    _add_models(commands.add_parser("models", help="load and unload models of a running worker"))

    token = commands.add_parser("token", help="make a token, and its line for the tokens file")
    token.description = (
        "Prints a new random token, which is kept nowhere, and then the line for the file of the "
        "worker's setting tokens_file."
    )
    token.add_argument("name", nargs="?", metavar="NAME", type=_token_name, help="whose it is")
    return parser


def _add_tls(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("for wss://")
    files = {
        "ca": "PEM file of the authorities to trust, or the server's own certificate; default: the "
        "system's, or SSL_CERT_FILE in the environment",
        "certificate": "PEM file to show to a server that asks for a certificate of the client",
        "key": "PEM file of its private key, where that is another one",
    }
    for name, text in files.items():
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)


def _add_bundle(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Imports FACTORY, calls it, loads the weights into what it returns, runs that on samples, "
        "and writes a bundle once all is in order. docs/bundles.md is the guide."
    )
    command.add_argument(
        "factory", metavar="FACTORY", help="package.module:factory, or a registered name"
    )
    command.add_argument("--name", required=True, metavar="NAME", help="name of the model")
    command.add_argument("--version", metavar="VERSION", help="default: the time in UTC")
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where NAME/VERSION is written"
    )
    command.add_argument(
        "--arguments", default="{}", metavar="JSON", help="of the factory: an object of keywords"
    )
    command.add_argument(
        "--weights",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.safetensors",
        help="its state_dict; once for each file. Default: as the factory made them",
    )
    command.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="NAME:DATATYPE:SIZE,…",
        help="in forward's order, per sample; -1: any size. For instance image:FP32:3,-1,-1",
    )
    command.add_argument(
        "--output-name",
        action="append",
        default=[],
        metavar="NAME",
        help="in the order returned; datatypes and shapes are found by running the model",
    )
    command.add_argument(
        "--state",
        action="append",
        default=[],
        metavar="NAME:DATATYPE:SIZE,…",
        help="forward takes it after the inputs and returns it after the outputs",
    )
    command.add_argument(
        "--feedback",
        action="append",
        default=[],
        metavar="OUTPUT=INPUT",
        help="for many responses to one request: this output is that input of the next step",
    )
    command.add_argument("--done", metavar="OUTPUT", help="the BOOL output that ends them")
    command.add_argument("--labels", default="", metavar="FILE|A,B,C", help="one a line in a file")
    command.add_argument(
        "--samples",
        type=Path,
        metavar="FILE.npz|FILE.safetensors",
        help="arrays [n, …] by input; `label` (true classes) and `expected.OUTPUT` may be there, "
        "too. Default: random ones",
    )
    command.add_argument(
        "--sample-count", type=_count, metavar="N", help="default: all of the file, or 16"
    )
    command.add_argument(
        "--dynamic-size",
        action="append",
        default=[],
        metavar="INPUT:N,…",
        help="of random samples, for each -1 of an input; default: 16",
    )
    command.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="INPUT:LOW,HIGH",
        help="of random samples; default: 0,1, and all values of integers of 8 bits",
    )
    command.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of all that is random; default: 0"
    )


def _add_models(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions = {
        "list": commands.add_parser("list", help="what is served, the default first"),
        "load": commands.add_parser("load", help="serve one more model, or version"),
        "unload": commands.add_parser("unload", help="serve a model, or one version, no more"),
        "reload": commands.add_parser("reload", help="serve what is newer in the same folders"),
    }
    for action in actions.values():
        action.add_argument(
            "--control",
            type=Path,
            default=os.environ.get("GPU_SERVICE_CONTROL") or None,
            required=not os.environ.get("GPU_SERVICE_CONTROL"),
            metavar="SOCKET",
            help="the worker's setting `control`; default: GPU_SERVICE_CONTROL in the environment",
        )
        action.add_argument(
            "--timeout-s",
            type=_positive,
            default=600.0,
            metavar="S",
            help="loading takes as long as warming up does; default: 600",
        )
    actions["load"].add_argument("path", type=Path, metavar="PATH", help=_BUNDLE)
    actions["unload"].add_argument("name", metavar="NAME")
    actions["unload"].add_argument("--version", metavar="VERSION", help="default: all of them")


def _add_load(load: argparse.ArgumentParser) -> None:
    load.description = (
        "Sends to URL and nowhere else, and ends by itself. A refused request counts as failed. "
        "Exit code 1 when anything failed."
    )
    load.add_argument("url", metavar="URL", help="ws://HOST:PORT of a gateway or a worker")
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, metavar="DIR", help=f"its test samples; {_BUNDLE}")
    source.add_argument(
        "--input",
        type=_input,
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="an array with its batch dimension, sent as it is; once for each input",
    )
    load.add_argument("--connections", type=_count, default=64, metavar="N", help="default: 64")
    load.add_argument("--requests", type=_count, metavar="N", help="end after so many")
    load.add_argument(
        "--duration-s", type=_positive, metavar="S", help="end after so long; default: 10"
    )
    load.add_argument(
        "--rate",
        type=_positive,
        metavar="R",
        help="send R a second, answered or not; latency then counts from when each was due. "
        "Default: each connection sends its next one when it has its answer",
    )
    load.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    load.add_argument("--plot", type=_svg, metavar="FILE.svg", help="draw the latencies")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _token_name(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x22\x24-\x7e]{1,128}", text):
        raise argparse.ArgumentTypeError("a name is up to 128 ASCII characters without spaces or #")
    return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _input(text: str) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if not (name and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE.npy")
    return name, Path(file)


def _svg(text: str) -> Path:
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r}: plots are SVG files; name it ….svg")
    return Path(text)


def _serve(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    problems = [f"{argument}: unknown argument" for argument in unknown]
    try:
        chosen = settings.load(vars(options), os.environ)
    except settings.SettingsError as error:
        problems += error.problems
    if problems:
        print("gpu_service serve: settings that cannot be used:", file=sys.stderr)
        for problem in problems:
            print(f"  - {problem}", file=sys.stderr)
        return 2

    from gpu_service import worker

    return worker.run(chosen, open_engine=_open_engine)


def _open_engine(chosen: settings.Settings, path: Path) -> "Engine":
    from gpu_service import bundle, engine

    engine.configure(threads=chosen.threads, precision=chosen.precision)
    return engine.open_bundle(
        bundle.find(path),
        device=engine.choose_device(chosen.device),
        max_batch=chosen.max_batch,
        max_streams=chosen.max_streams,
        max_fused=chosen.max_fused,
        precision=chosen.precision,
        factories=settings.listed(chosen.factories),
    )


def _token(options: argparse.Namespace) -> int:
    from gpu_service import admission

    for line in admission.new_token(options.name or ""):
        print(line)
    return 0


def _bundle(options: argparse.Namespace) -> int:
    from gpu_service import bundle, inspection

    try:
        if options.command == "compare":
            return inspection.compare(bundle.find(options.before), bundle.find(options.after))
        if options.command == "inspect":
            return inspection.main(bundle.find(options.bundle))
        path = _make_bundle(options)
        inspection.main(path)
    except bundle.BundleError as error:
        print(f"gpu_service {options.command}: {error}", file=sys.stderr)
        return 1
    if not options.weights:
        print(f"no --weights: they are as the factory made them, with seed {options.seed}")
    factories = f" --factories {options.factory}" if ":" in options.factory else ""
    print(f"serve it: python -m gpu_service serve --bundle {path}{factories}")
    return 0


def _make_bundle(options: argparse.Namespace) -> Path:
    from gpu_service import bundling

    return bundling.make(
        bundling.Plan(
            factory=options.factory,
            name=options.name,
            version=options.version,
            directory=options.output,
            arguments=options.arguments,
            weights=tuple(options.weights),
            inputs=tuple(options.input),
            output_names=tuple(options.output_name),
            state=tuple(options.state),
            feedback=tuple(options.feedback),
            done=options.done,
            labels=options.labels,
            samples=options.samples,
            sample_count=options.sample_count,
            dynamic_sizes=tuple(options.dynamic_size),
            ranges=tuple(options.range),
            seed=options.seed,
        )
    )


def _models(options: argparse.Namespace) -> int:
    from gpu_service import control_client

    control, timeout_s = options.control, options.timeout_s
    try:
        match options.action:
            case "list":
                control_client.list_models(control, timeout_s=timeout_s)
            case "load":
                control_client.load(control, options.path, timeout_s=timeout_s)
            case "unload":
                name, version = options.name, options.version
                control_client.unload(control, name, version, timeout_s=timeout_s)
            case "reload":
                control_client.reload(control, timeout_s=timeout_s)
    except control_client.ControlError as error:
        print(f"gpu_service models {options.action}: {error}", file=sys.stderr)
        return 1
    return 0


def _ask(options: argparse.Namespace) -> int:
    from gpu_service import bundle, client, client_tls, load, load_report, predict, verify

    try:
        token = client.read_token(options.token_file)
        tls = _tls(options)
        if options.command == "verify":
            path = bundle.find(options.bundle)
            return verify.main(
                path=path, urls=options.urls, timeout_s=options.timeout_s, token=token, tls=tls
            )
        if options.command == "load":
            return load.main(
                load_report.Plan(
                    url=options.url,
                    connections=options.connections,
                    requests=options.requests,
                    duration_s=options.duration_s,
                    rate=options.rate,
                ),
                path=bundle.find(options.bundle) if options.bundle else None,
                files=options.input,
                json_file=options.json,
                plot_file=options.plot,
                token=token,
                tls=tls,
            )
        return predict.main(
            url=options.url,
            path=bundle.find(options.bundle) if options.bundle else None,
            files=options.image,
            count=options.count,
            as_json=options.json,
            token=token,
            tls=tls,
        )
    except (
        *(bundle.BundleError, client.ClientError, client_tls.TlsFilesError),
        *(predict.InputError, load.InputError),
    ) as error:
        print(f"gpu_service {options.command}: {error}", file=sys.stderr)
        return 1


def _tls(options: argparse.Namespace) -> "ssl.SSLContext | None":
    """What `--ca`, `--certificate` and `--key` come to. Raises client_tls.TlsFilesError."""
    from gpu_service import client_link, client_tls

    given = {name: getattr(options, name) for name in ("ca", "certificate", "key")}
    if not any(given.values()):
        return None
    urls = options.urls if options.command == "verify" else [options.url]
    for url in urls:
        if not client_link.is_secure(url):
            names = ", ".join(f"--{name}" for name, path in given.items() if path)
            raise client_tls.TlsFilesError(f"{names}: of no use for {url}, which is not wss://")
    return client_tls.context(**given)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # as shells say it; a traceback would say no more
