"""What a machine that can't host a lab is told."""

from __future__ import annotations

import os
import sys

import pytest

from lab import requirements
from lab.errors import LabError


def test_another_system_is_the_only_reason_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert requirements.unmet() == ["the hosts are Linux containers, and this is darwin"]


def test_without_root_all_is_said_at_once_and_what_works_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(
        requirements, "_os_release", lambda: {"PRETTY_NAME": "Other 1", "VERSION_CODENAME": "one"}
    )
    with pytest.raises(LabError) as caught:
        requirements.require()
    said = str(caught.value)
    assert "root" in said
    assert "must be Debian 12: this is Other 1" in said
    assert "make test-unit" in said


def test_tools_that_setup_installs_are_named_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert requirements.missing_tools() == requirements.TOOLS


class Apt:
    """Stands for apt-get: records what it is asked, refuses the first installation if told to."""

    def __init__(self, *, refuse_first: bool) -> None:
        self.asked: list[list[str]] = []
        self._refuse = refuse_first

    def __call__(self, arguments: list[str]) -> None:
        self.asked.append(arguments)
        if self._refuse and arguments[0] == "install":
            self._refuse = False
            raise LabError("no such version")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is missing until something is installed: the container tools."""
    left = {"systemd-nspawn": "systemd-container"}
    monkeypatch.setattr(requirements, "missing_tools", lambda tools: left)
    monkeypatch.setattr(requirements, "run", lambda command: "252.1-1")
    monkeypatch.setattr(requirements, "_has_package_lists", lambda: True)
    return left


def test_the_container_tools_are_pinned_to_the_installed_systemd(
    missing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = Apt(refuse_first=False)
    monkeypatch.setattr(requirements, "_apt", apt)
    with pytest.raises(LabError, match="still missing after the installation: systemd-nspawn"):
        requirements.install_tools(lambda line: None)
    assert apt.asked == [["install", "systemd-container=252.1-1"]]


def test_old_package_lists_are_renewed_and_the_pin_given_up(
    missing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = Apt(refuse_first=True)

    def install(arguments: list[str]) -> None:
        apt(arguments)
        if arguments[0] == "install":
            missing.clear()

    monkeypatch.setattr(requirements, "_apt", install)
    requirements.install_tools(lambda line: None)
    assert apt.asked == [
        ["install", "systemd-container=252.1-1"],
        ["update"],
        ["install", "systemd-container"],
    ]


def test_a_machine_without_package_lists_fetches_them_first(
    missing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = Apt(refuse_first=False)
    monkeypatch.setattr(requirements, "_apt", apt)
    monkeypatch.setattr(requirements, "_has_package_lists", lambda: False)
    with pytest.raises(LabError):
        requirements.install_tools(lambda line: None)
    assert apt.asked[0] == ["update"]
