"""The recipe of the base image: pure parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab import image


def test_any_change_of_the_recipe_is_another_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe"
    shutil.copytree(image.RECIPE, recipe)
    before = image.base_path(tmp_path)
    monkeypatch.setattr(image, "RECIPE", recipe)
    assert image.base_path(tmp_path) == before
    (recipe / "nginx.conf").write_text("user root;\n")
    changed = image.base_path(tmp_path)
    assert changed != before
    (recipe / "nginx.conf").rename(recipe / "other.conf")
    assert image.base_path(tmp_path) not in {before, changed}


def test_an_image_that_exists_is_used_as_it_is(tmp_path: Path) -> None:
    image.base_path(tmp_path).mkdir(parents=True)
    said: list[str] = []
    base = image.ensure_base(tmp_path, in_use=set, progress=said.append)
    assert base == image.base_path(tmp_path)
    assert said == []


def test_the_spec_gives_each_el_name_the_version_of_what_it_stands_for() -> None:
    versions = dict.fromkeys((*image.PRESENT.values(), *image.OFFERED.values()), "1.0")
    versions["iproute2"] = "6.1.0"
    text = image.base_spec(versions)
    assert "%package -n iproute\nVersion: 6.1.0\n" in text
    assert "%package -n python3.11\n" in text
    assert "Provides: system-release = 9" in text
    assert text.count("%files") == 1 + len(image.PRESENT) + len(image.OFFERED)


def test_another_labs_image_is_found_by_its_name(tmp_path: Path) -> None:
    assert image.base_path(tmp_path, "base-1") == tmp_path / "cache/base-1"
