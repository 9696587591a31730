"""Coverage-guided fuzzing of one target with atheris: `python -m fuzz.frames` and its like.

Owns `.cache/fuzz/TARGET`: seeds written by the target, what the fuzzer found to be different,
and inputs that broke something, which are handed over as arguments to see them fail again.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["fuzz", "gpu_service", "websockets"]):
    from fuzz import targets

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "fuzz"


def main(name: str) -> None:
    """Fuzz for as long as the command line says; exits with 0, or with 77 for a finding."""
    target, seeds = targets.TARGETS[name]
    parser = argparse.ArgumentParser(prog=f"python -m fuzz.{name}", description=target.__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("inputs", nargs="*", help="run these files alone")
    options = parser.parse_args()
    arguments = [f"fuzz.{name}", *(options.inputs or _arguments(name, seeds(), options.seconds))]
    atheris.Setup(arguments, target, custom_mutator=_mutate)
    atheris.Fuzz()


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Every other time, and where there is JSON, change that; else the bytes."""
    for start in (0, 1) if seed % 2 else ():
        text, newline, rest = data[start:].partition(b"\n")
        changed = targets.mutate_json(text, seed=seed)
        if changed is not None:
            return (data[:start] + changed + newline + rest)[:max_size]
    mutated: bytes = atheris.Mutate(data, max_size)
    return mutated


def _arguments(name: str, seeds: Iterator[bytes], seconds: int) -> list[str]:
    folder = FOLDER / name
    found, given = folder / "corpus", folder / "seeds"
    found.mkdir(parents=True, exist_ok=True)
    given.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        (given / f"{number:03}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in targets.WORDS))
    options = {
        "max_total_time": seconds,
        "max_len": 8192,
        "timeout": 10,
        "rss_limit_mb": 2048,
        "dict": words,
        "artifact_prefix": f"{folder}/",
        "verbosity": 0,
        "print_final_stats": 1,
    }
    return [*(f"-{key}={value}" for key, value in options.items()), str(found), str(given)]


if __name__ == "__main__":
    sys.exit("run one of: " + ", ".join(f"python -m fuzz.{name}" for name in targets.TARGETS))
