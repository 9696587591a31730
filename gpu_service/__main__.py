"""The command line: `python -m gpu_service serve|settings|predict|verify|load`.

Owns parsing and exit codes (0 done, 1 failed, 2 used wrongly). Imports what a command needs
only when it runs: torch for `serve` alone, on the inference thread.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_service import settings

if TYPE_CHECKING:
    from gpu_service.dispatch import Engine

_DESCRIPTION = "Serve a model over WebSocket, and ask one that is served."
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

    _add_load(commands.add_parser("load", help="send many requests and measure the answers"))
    return parser


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


def _open_engine(chosen: settings.Settings) -> "Engine":
    from gpu_service import bundle, engine

    return engine.open_bundle(
        bundle.find(chosen.bundle),
        device=chosen.device,
        threads=chosen.threads,
        max_batch=chosen.max_batch,
    )


def _ask(options: argparse.Namespace) -> int:
    from gpu_service import bundle, client, load, load_report, predict, verify

    try:
        if options.command == "verify":
            path = bundle.find(options.bundle)
            return verify.main(path=path, urls=options.urls, timeout_s=options.timeout_s)
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
            )
        return predict.main(
            url=options.url,
            path=bundle.find(options.bundle) if options.bundle else None,
            files=options.image,
            count=options.count,
            as_json=options.json,
        )
    except (bundle.BundleError, client.ClientError, predict.InputError, load.InputError) as error:
        print(f"gpu_service {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # as shells say it; a traceback would say no more
