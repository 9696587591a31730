"""`python -m gpu_service verify`: does each worker answer as the bundle says it must?

Owns nothing between calls: reads a bundle's samples, asks each address once, all at the same
time. For deploys and scripts, so its output is JSON lines. Starts fast: no torch.
"""

import asyncio
import functools
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TextIO

import msgspec
import numpy

from gpu_service import bundle, golden
from gpu_service.client import Client, ClientError
from gpu_service.device import Tensors


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one address answered. `error` says what is wrong, None where `ok`."""

    url: str
    ok: bool
    worker: str | None = None
    model: str | None = None
    version: str | None = None
    max_abs_diff: float | None = None
    error: str | None = None


def main(
    *,
    path: Path,
    urls: Sequence[str],
    timeout_s: float,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    output: TextIO = sys.stdout,
) -> int:
    """Verify all `urls` against the bundle in `path`; 0 if all are ok, else 1.

    Prints one JSON object a line, in the order of `urls`. Raises bundle.BundleError.
    """
    manifest = bundle.read_manifest(path)
    samples = bundle.load_samples(path)
    client_of = functools.partial(Client, deadline_s=timeout_s, token=token, tls=tls)
    ask = functools.partial(
        _one, client_of=client_of, manifest=manifest, samples=samples, timeout_s=timeout_s
    )
    verdicts = asyncio.run(_all(ask, urls))
    for verdict in verdicts:
        print(msgspec.json.encode(verdict).decode(), file=output)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


async def _all(ask: Callable[[str], Awaitable[Verdict]], urls: Sequence[str]) -> list[Verdict]:
    return await asyncio.gather(*map(ask, urls))


async def _one(
    url: str,
    *,
    client_of: Callable[[str], Client],
    manifest: bundle.Manifest,
    samples: Tensors,
    timeout_s: float,
) -> Verdict:
    try:
        async with asyncio.timeout(timeout_s), client_of(url) as client:
            # One by one, because a worker may allow smaller batches than there are samples.
            requests = golden.one_by_one(samples)
            results = await asyncio.gather(
                *(client.infer(inputs, model=manifest.name) for inputs in requests)
            )
    except ClientError as error:
        return Verdict(url=url, ok=False, error=str(error))
    except TimeoutError:
        return Verdict(url=url, ok=False, error=f"{url}: no answer within {timeout_s:g} s")
    outputs = {
        name: numpy.concatenate([result.outputs[name] for result in results])
        for name in results[0].outputs
    }
    comparison = golden.compare(outputs, samples)
    problem = comparison.problem
    result = results[0]
    if (result.model_name, result.model_version) != (manifest.name, manifest.version):
        problem = (
            f"serves {result.model_name} {result.model_version}, expected "
            f"{manifest.name} {manifest.version}"
        )
    return Verdict(
        url=url,
        ok=problem is None,
        worker=result.worker,
        model=result.model_name,
        version=result.model_version,
        max_abs_diff=comparison.max_abs_diff,
        error=problem,
    )
