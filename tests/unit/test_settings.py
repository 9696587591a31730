import argparse
import dataclasses
from pathlib import Path

import pytest

from gpu_service import settings
from gpu_service.settings import Settings, SettingsError

NAMES = [field.name for field in dataclasses.fields(Settings)]


def problems_of(options: dict[str, str | None], environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings.load(options, environ)
    return caught.value.problems


def test_defaults_apply_where_nothing_is_said() -> None:
    loaded = settings.load({"bundle": "/models/m/1"}, {})
    assert loaded == Settings(bundle=(Path("/models/m/1"),))
    assert (loaded.host, loaded.port, loaded.max_batch) == ("127.0.0.1", 9005, 64)


def test_an_option_wins_over_the_environment() -> None:
    environ = {"GPU_SERVICE_PORT": "1111", "GPU_SERVICE_BUNDLE": "/b", "PATH": "/bin"}
    assert settings.load({"port": None}, environ).port == 1111
    assert settings.load({"port": "2222"}, environ).port == 2222


def test_every_setting_can_be_an_option_and_a_variable() -> None:
    parser = argparse.ArgumentParser()
    settings.add_options(parser)
    texts = {
        "bundle": "/b:/c",
        "host": "::",
        "device": "cuda:3",
        "worker": "w",
        "deployment": "d",
        "factories": "mine.nets:tiny, theirs",
        "precision": "bf16",
        "cpus": "0-3,6",
        "control": "/run/worker.control",
        "tokens_file": "/etc/tokens",
        "origins": "https://a.example.com:8443, https://*.example.org, http://[::1]:3000",
        "trusted_proxies": "10.0.0.0/8, 2001:db8::1",
        "otlp_endpoint": "http://localhost:4318/v1",
        "otlp_sample": "0.5",
    }
    for name in NAMES:
        texts.setdefault(name, "1024")
    arguments = [part for name in NAMES for part in (settings.option_of(name), texts[name])]
    from_options = settings.load(vars(parser.parse_args(arguments)), {})
    environ = {f"GPU_SERVICE_{name.upper()}": text for name, text in texts.items()}
    assert settings.load({}, environ) == from_options
    assert from_options.bundle == (Path("/b"), Path("/c"))
    assert from_options.device == "cuda:3"
    assert from_options.ping_interval_s == 1024.0


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        {"port": "65536", "max_batch": "0", "device": "gpu", "threads": "many"},
        {"GPU_SERVICE_MAX_QUEUE": "nan", "GPU_SERVICE_PING_TIMEOUT_S": "nan"},
    )
    said = "\n".join(problems)
    assert len(problems) == 7, said
    for part in (
        "--bundle (or GPU_SERVICE_BUNDLE) is needed",
        "--port: 65536 is not between 0 and 65535",
        "--max-batch: 0 is not between",
        "--device: 'gpu' is not allowed",
        "--threads: 'many' is not a whole number",
        "GPU_SERVICE_MAX_QUEUE: 'nan' is not a whole number",
        "GPU_SERVICE_PING_TIMEOUT_S: nan is not between",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("factories", "a.b:c,os.system(1),:x", ["'os.system(1)': not package", "':x': not"]),
        ("factories", "a,,b", ["'': an empty item"]),
        ("precision", "fp16", ["'fp16' is not allowed"]),
        ("cpus", "0,3-1,x", ["'3-1': ends before it begins; 1-3 is meant", "'x': not a CPU"]),
        ("origins", "https://A.com,a.com", ["'https://A.com': not an Origin", "'a.com': not"]),
        ("origins", "https://a.com/", ["without a path"]),
        ("origins", "*", ["'*': not an Origin"]),
        ("origins", "https://a*.com", ["'https://a*.com': not an Origin"]),
        ("origins", "null", ["'null': not an Origin"]),
        ("trusted_proxies", "10.0.0.1/8,x", ["10.0.0.1/8 has host bits set", "'x' does not"]),
        ("otlp_endpoint", "localhost:4318", ["OTLP/HTTP address"]),
        ("otlp_sample", "1.5", ["1.5 is not between 0 and 1"]),
        ("bundle", "/a::/b", ["'/a::/b' names an empty folder"]),
        ("bundle", "/a:/b:/a", ["names /a more than once"]),
    ],
)
def test_what_is_wrong_with_a_text_is_said_item_by_item(
    name: str, text: str, parts: list[str]
) -> None:
    (problem,) = problems_of({"bundle": "/b", name: text}, {})
    assert problem.startswith(f"{settings.option_of(name)}: ")
    for part in parts:
        assert part in problem


def test_lists_are_read() -> None:
    assert settings.listed("") == ()
    assert settings.listed(" a, b ") == ("a", "b")
    assert settings.cpus_of("0-3,6") == {0, 1, 2, 3, 6}
    assert settings.cpus_of("") == frozenset()


def test_a_misspelt_variable_is_reported_with_what_was_meant() -> None:
    (problem,) = problems_of({"bundle": "/b"}, {"GPU_SERVICE_MAX_BACH": "8"})
    assert problem == (
        "GPU_SERVICE_MAX_BACH: there is no such setting; did you mean GPU_SERVICE_MAX_BATCH?"
    )


def test_settings_that_contradict_each_other_are_refused() -> None:
    (problem,) = problems_of({"bundle": "/b", "max_batch": "64", "max_queue": "63"}, {})
    assert "--max-queue" in problem
    assert "--max-batch" in problem


def test_an_empty_bundle_is_refused() -> None:
    (problem,) = problems_of({}, {"GPU_SERVICE_BUNDLE": ""})
    assert problem == "GPU_SERVICE_BUNDLE: must not be empty"


def test_a_name_with_a_space_is_refused() -> None:
    (problem,) = problems_of({"bundle": "/b", "worker": "my worker"}, {})
    assert problem.startswith("--worker: 'my worker' is not allowed")


def test_the_reference_has_a_complete_row_for_every_setting() -> None:
    rows = settings.reference().splitlines()[2:]
    assert len(rows) == len(NAMES)
    for name, row in zip(NAMES, rows, strict=True):
        cells = row.replace("\\|", "").strip("| ").split(" | ")
        assert cells[0] == f"`{settings.option_of(name)}`"
        assert cells[1] == f"`GPU_SERVICE_{name.upper()}`"
        assert len(cells[-1]) > 10
