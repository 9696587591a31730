"""The registry of architectures, and how the weights of a bundle become a model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from gpu_service import bundle, models
from gpu_service.models.digits import DigitsCNN

ARCHITECTURE = bundle.Architecture(name="digits_cnn", arguments={"width": 4})
IMAGE = torch.rand((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))


def write(directory: Path, **changes: Any) -> Path:
    model = DigitsCNN(width=4).eval()
    with torch.inference_mode():
        logits = model(IMAGE)
    arguments: dict[str, Any] = {
        "directory": directory,
        "name": "digits",
        "version": "v1",
        "architecture": ARCHITECTURE,
        "inputs": (bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 28, 28)),),
        "outputs": (bundle.TensorSpec(name="logits", datatype="FP32", shape=(10,)),),
        "labels": tuple("0123456789"),
        "training": bundle.Training(
            dataset="none",
            dataset_sha256="",
            train_samples=0,
            test_samples=0,
            epochs=0,
            seed=0,
            world_size=1,
            backend="gloo",
            torch=str(torch.__version__),
            metrics={},
        ),
        "state_dict": model.state_dict(),
        "samples": {
            "image": IMAGE.numpy(),
            "expected.logits": logits.numpy(),
            "label": numpy.zeros(3, "i8"),
        },
    }
    return bundle.write(**(arguments | changes))


def test_a_loaded_model_answers_as_the_written_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    model = models.load_model(path)
    assert not model.training
    samples = bundle.load_samples(path)
    with torch.inference_mode():
        logits = model(torch.from_numpy(samples["image"]))
    numpy.testing.assert_array_equal(logits.numpy(), samples["expected.logits"])


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, architecture=bundle.Architecture(name="transformer", arguments={}))
    with pytest.raises(
        bundle.BundleError, match=r"'transformer'.* knows: digits_cnn, vit, watch_gru\."
    ):
        models.load_model(path)


@pytest.mark.parametrize("arguments", [{"depth": 3}, {"width": "wide"}, {"width": -1}])
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(bundle.BundleError, match="'digits_cnn': "):
        models.build(bundle.Architecture(name="digits_cnn", arguments=arguments))


def test_weights_must_have_the_architecture_s_keys(tmp_path: Path) -> None:
    state = DigitsCNN(width=4).state_dict()
    bias = state.pop("layers.0.bias")
    path = write(tmp_path, state_dict=state | {"layers.0.surprise": bias})
    with pytest.raises(bundle.BundleError, match=r"model\.safetensors: does not fit") as error:
        models.load_model(path)
    assert "layers.0.bias" in str(error.value)
    assert "layers.0.surprise" in str(error.value)


def test_weights_must_have_the_architecture_s_shapes(tmp_path: Path) -> None:
    path = write(tmp_path, state_dict=DigitsCNN(width=5).state_dict())
    with pytest.raises(bundle.BundleError, match=r"does not fit.*\n?.*size mismatch"):
        models.load_model(path)


def test_damaged_weights_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    data = bytearray((path / bundle.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / bundle.WEIGHTS).write_bytes(data)
    monkeypatch.setattr(
        models, "build", lambda *_, **__: pytest.fail("built from a damaged bundle")
    )
    with pytest.raises(bundle.BundleError, match=r"model\.safetensors: sha256"):
        models.load_model(path)


def test_weights_that_are_no_safetensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned by the manifest as they are, and still nothing that can be loaded."""
    monkeypatch.setattr("safetensors.torch.save", lambda _: b"\xff" * 64)
    path = write(tmp_path)
    with pytest.raises(bundle.BundleError, match=r"model\.safetensors: "):
        models.load_model(path)


# ------------------------------------------------------------------------------ brought ones

NETWORKS = """
import os
from os import system
from my_helpers import hidden_away

import torch

loaded = []


class Scale(torch.nn.Module):
    def __init__(self, *, by: float = 1.0) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x * self.by


def scale(*, by: float = 1.0):
    return Scale(by=by)


def _private():
    return Scale()


def fails():
    raise KeyError("lost")


def number():
    return 3


count = 3
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of somebody, which can be imported."""
    folder = tmp_path / "code"
    (folder / "my_networks").mkdir(parents=True)
    (folder / "my_networks/__init__.py").write_text("from my_networks.scaling import Scale\n")
    (folder / "my_networks/scaling.py").write_text(NETWORKS)
    (folder / "my_networks/broken.py").write_text("raise RuntimeError('half written')\n")
    (folder / "my_helpers.py").write_text("def hidden_away(): ...\n")
    monkeypatch.syspath_prepend(folder)
    names = ("my_networks", "my_networks.scaling", "my_networks.broken", "my_helpers")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield "my_networks.scaling"
    for name in names:
        sys.modules.pop(name, None)


def architecture(name: str, **arguments: Any) -> bundle.Architecture:
    return bundle.Architecture(name=name, arguments=arguments)


def refused(name: str, *factories: str, **arguments: Any) -> str:
    with pytest.raises(bundle.BundleError) as caught:
        models.build(architecture(name, **arguments), factories=factories)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("my_networks.scaling:Scale", "my_networks.scaling:Scale"),
        ("my_networks.scaling:scale", "my_networks.scaling:scale"),
        ("my_networks.scaling:scale", "my_networks.scaling"),
        ("my_networks:Scale", "my_networks"),
        ("my_networks.scaling:_private", "my_networks.scaling:_private"),
    ],
)
def test_what_the_caller_allows_is_built(networks: str, name: str, allowed: str) -> None:
    model = models.build(architecture(name), factories=("other", allowed))
    assert model(torch.tensor(2.0)).item() == 2.0


def test_a_brought_model_gets_its_arguments_and_its_weights(tmp_path: Path, networks: str) -> None:
    x = numpy.array([[1.0], [2.0]], "<f4")
    path = write(
        tmp_path,
        architecture=architecture("my_networks.scaling:Scale", by=2.0),
        inputs=(bundle.TensorSpec(name="x", datatype="FP32", shape=(1,)),),
        outputs=(bundle.TensorSpec(name="y", datatype="FP32", shape=(1,)),),
        labels=(),
        training=None,
        state_dict={"by": torch.tensor(3.0)},
        samples={"x": x, "expected.y": 3 * x},
    )
    with pytest.raises(bundle.BundleError, match="does not allow"):
        models.load_model(path)
    model = models.load_model(path, factories=(networks,))
    assert not model.training
    assert model(torch.tensor(5.0)).item() == 15.0


@pytest.mark.parametrize(
    "allowed",
    [(), ("my_networks",), ("my_networks.scaling:scale",), ("my_networks.scaling:Scale2",)],
)
def test_what_is_not_allowed_is_never_imported(networks: str, allowed: tuple[str, ...]) -> None:
    said = refused("my_networks.scaling:Scale", *allowed)
    setting = ",".join((*allowed, "my_networks.scaling:Scale"))
    assert f"GPU_SERVICE_FACTORIES={setting} or --factories {setting}" in said
    assert networks not in sys.modules
    assert "my_networks" not in sys.modules


@pytest.mark.parametrize("attribute", ["system", "hidden_away", "_private"])
def test_a_module_s_imports_and_private_names_are_not_allowed_with_it(
    networks: str, attribute: str
) -> None:
    said = refused(f"{networks}:{attribute}", networks, command="touch /tmp/never")
    assert f"add {networks}:{attribute} to GPU_SERVICE_FACTORIES" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks.scaling:missing", "has no attribute 'missing'"),
        ("my_networks.nowhere:Scale", "ModuleNotFoundError: No module named 'my_networks.nowhere'"),
        ("my_networks.broken:Scale", "RuntimeError: half written"),
        ("my_networks.scaling:count", "int is not callable"),
        ("my_networks.scaling:number", "returned int, not a torch.nn.Module"),
        ("my_networks.scaling:fails", "KeyError: 'lost'"),
    ],
)
def test_a_factory_that_fails_is_a_bundle_error(networks: str, name: str, message: str) -> None:
    said = refused(name, name)
    assert said.startswith(f"architecture {name!r}: ")
    assert message in said


def install(folder: Path, distribution: str, entry_points: str) -> None:
    """What pip leaves of a package, as far as it is asked here."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gpu_service.models]\n{entry_points}\n")


def test_installed_packages_provide_architectures(
    tmp_path: Path, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "my-networks", "scale = my_networks.scaling:Scale")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert models.build(architecture("scale", by=4.0))(torch.tensor(2.0)).item() == 8.0
    assert "knows: digits_cnn, scale, vit, watch_gru." in refused("transformer")


def test_an_installed_package_takes_no_other_s_place(
    tmp_path: Path, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "one", "digits_cnn = my_networks.scaling:Scale\nscale = a:b")
    install(tmp_path / "site", "two", "scale = my_networks.scaling:Scale")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert isinstance(models.build(ARCHITECTURE), DigitsCNN)
    assert "several installed packages provide it: a:b, my_networks.scaling:Scale" in refused(
        "scale"
    )


def test_an_installed_package_that_cannot_be_imported_is_named(
    tmp_path: Path, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "one", "scale = my_networks.broken:Scale")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "my_networks.broken:Scale: RuntimeError: half written" in refused("scale")


# ------------------------------------------------------------------------------ digits


def test_a_sample_s_logits_do_not_depend_on_the_rest_of_its_batch() -> None:
    """Also in training mode: what makes many ranks equal to one process."""
    model = DigitsCNN(width=4).double()
    together = model(IMAGE.double())
    alone = torch.cat([model(image[None]) for image in IMAGE.double()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_pixels_are_normalised_by_the_model() -> None:
    """Shifting and scaling pixels and statistics alike leaves the answer as it was."""
    torch.manual_seed(0)
    one = DigitsCNN(width=4, mean=0.1, std=0.3).double()
    other = DigitsCNN(width=4, mean=0.1 * 255, std=0.3 * 255).double()
    other.layers.load_state_dict(one.layers.state_dict())
    torch.testing.assert_close(one(IMAGE.double()), other(IMAGE.double() * 255))
