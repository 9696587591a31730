"""The registry of architectures, and how the weights of a bundle become a model."""

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
    with pytest.raises(bundle.BundleError, match=r"'transformer'.* knows: digits_cnn\."):
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
    monkeypatch.setattr(models, "build", lambda _: pytest.fail("built from a damaged bundle"))
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
