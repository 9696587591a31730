"""The architectures that a bundle may name, and how its weights become a module.

Owns the registry: data never leads to an import. Whoever calls `load_model` owns the module.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from gpu_service import bundle
from gpu_service.models.digits import DigitsCNN

REGISTRY: Mapping[str, Callable[..., torch.nn.Module]] = {"digits_cnn": DigitsCNN}


def build(architecture: bundle.Architecture) -> torch.nn.Module:
    """A freshly initialised module for `architecture`; BundleError if it is not known."""
    try:
        factory = REGISTRY[architecture.name]
    except KeyError:
        known = ", ".join(sorted(REGISTRY))
        raise bundle.BundleError(
            f"unknown architecture {architecture.name!r}; this version of gpu_service knows: "
            f"{known}. Deploy the gpu_service that wrote this bundle, or train it anew"
        ) from None
    try:
        return factory(**architecture.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise bundle.BundleError(f"architecture {architecture.name!r}: {error}") from None


def load_model(path: Path) -> torch.nn.Module:
    """The model of the bundle folder `path`, on the CPU, in eval mode.

    Takes the manifest's inputs in order, each [n, …], and returns its one output [n, …], or a
    tuple of them in order. Every file is verified first; weights must fit the architecture
    exactly. Raises BundleError.
    """
    manifest = bundle.verify(path)
    model = build(manifest.architecture)
    file = path / bundle.WEIGHTS
    try:
        model.load_state_dict(safetensors.torch.load_file(file), strict=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise bundle.BundleError(
            f"{file}: does not fit architecture {manifest.architecture.name!r}: {error}"
        ) from None
    return model.eval()
