"""The networks that a bundle may name, and how its weights become a module.

Owns the registry: those of gpu_service, those of installed packages (entry points in the group
`gpu_service.models`), and what the caller allows. A bundle is data: it picks among these, and
never leads to any other import. Whoever calls `load_model` owns the module.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from gpu_service import bundle
from gpu_service.models.digits import DigitsCNN
from gpu_service.models.vit import VisionTransformer
from gpu_service.models.watch import WatchGRU

ENTRY_POINTS = "gpu_service.models"

# No entry point takes the place of one of these: bundles of training name them.
REGISTRY: Mapping[str, Callable[..., torch.nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "vit": VisionTransformer,
    "watch_gru": WatchGRU,
}


def build(architecture: bundle.Architecture, *, factories: tuple[str, ...] = ()) -> torch.nn.Module:
    """A freshly initialised module for `architecture`, on the CPU.

    `factories` are the `package.module` and `package.module:factory` that it may name beside the
    registry. Raises BundleError if it is not known, not allowed, or fails.
    """
    name = architecture.name
    module_and_attribute = bundle.factory(architecture)
    if module_and_attribute is None:
        factory = _registered(name)
    else:
        factory = _allowed(name, *module_and_attribute, factories=factories)
    try:
        model = factory(**architecture.arguments)
    except Exception as error:  # the factory may be anybody's
        raise bundle.BundleError(f"architecture {name!r}: {_said(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise bundle.BundleError(
            f"architecture {name!r}: returned {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def load_model(path: Path, *, factories: tuple[str, ...] = ()) -> torch.nn.Module:
    """The model of the bundle folder `path`, on the CPU, in eval mode.

    Takes the manifest's inputs and then its state in order, each [n, …], and returns its one
    output [n, …], or a tuple of its outputs and then the new state in order. Every file is
    verified first; weights must fit the architecture exactly. `factories` as for `build`. Raises
    BundleError.
    """
    manifest = bundle.verify(path)
    model = build(manifest.architecture, factories=factories)
    file = path / bundle.WEIGHTS
    try:
        model.load_state_dict(safetensors.torch.load_file(file), strict=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise bundle.BundleError(
            f"{file}: does not fit architecture {manifest.architecture.name!r}: {error}"
        ) from None
    return model.eval()


def _registered(name: str) -> Callable[..., Any]:
    if name in REGISTRY:
        return REGISTRY[name]
    # The same package may be found twice, in a checkout and installed from it.
    installed = {point.value: point for point in _entry_points() if point.name == name}
    if len(installed) > 1:
        raise bundle.BundleError(
            f"architecture {name!r}: several installed packages provide it: "
            f"{', '.join(sorted(installed))}; uninstall all but one"
        )
    for point in installed.values():
        try:
            factory: Callable[..., Any] = point.load()
        except Exception as error:  # an import runs anybody's code
            raise bundle.BundleError(
                f"architecture {name!r}: {point.value}: {_said(error)}"
            ) from error
        return factory
    known = ", ".join(sorted({*REGISTRY, *(point.name for point in _entry_points())}))
    raise bundle.BundleError(
        f"unknown architecture {name!r}; this version of gpu_service knows: {known}. Deploy the "
        "gpu_service that wrote this bundle, install the package that provides it (an entry point "
        f"in the group {ENTRY_POINTS}), or write the bundle anew"
    )


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=ENTRY_POINTS)


def _allowed(
    name: str, module: str, attribute: str, *, factories: tuple[str, ...]
) -> Callable[..., Any]:
    if name not in factories and module not in factories:
        setting = ",".join((*factories, name))
        raise bundle.BundleError(
            f"architecture {name!r} would run code that this worker does not allow. If you trust "
            f"it, allow it: GPU_SERVICE_FACTORIES={setting} or --factories {setting}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # an import runs anybody's code
        raise bundle.BundleError(
            f"architecture {name!r}: {_said(error)}. Its package must be installed where this "
            "runs, or its folder be in PYTHONPATH"
        ) from error
    if not callable(found):
        raise bundle.BundleError(f"architecture {name!r}: {type(found).__name__} is not callable")
    factory: Callable[..., Any] = found
    if name not in factories and not _is_own(factory, module, attribute):
        # What a module merely imported can be anything: `from os import system`, say.
        raise bundle.BundleError(
            f"architecture {name!r}: not a public class or function of {module} itself; to allow "
            f"it all the same, add {name} to GPU_SERVICE_FACTORIES or --factories"
        )
    return factory


def _is_own(factory: Callable[..., Any], module: str, attribute: str) -> bool:
    home = str(getattr(factory, "__module__", ""))
    return not attribute.startswith("_") and (home == module or home.startswith(module + "."))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
