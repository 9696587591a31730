"""nginx's versions: read, compared, chosen; what each can do, and what the template makes of it.

What real builds say to the renderings is in tests/deploy/test_nginx_versions.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossplane
import pytest

from provision import nginx_versions, rendering
from provision.nginx_versions import Feature, Version
from tests.unit.provision.fleets import fleet, gateway, worker
from tests.unit.provision.test_nginx_conf import flat
from tests.unit.provision.test_settings import problems

CHECKOUT = Path(__file__).resolve().parents[3]
TLS = {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"}


def rendered(tmp_path: Path, version: str, **settings: Any) -> list[tuple[str, list[str]]]:
    """The directives for a version, as crossplane reads them."""
    found = fleet(gateway(**settings), worker())
    wanted = nginx_versions.parse(version)
    assert wanted is not None
    path = tmp_path / "nginx.conf"
    path.write_bytes(rendering.nginx_conf(found.gateways["gw1"], found, version=wanted))
    # Not strict: crossplane 0.5.8 knows the directives of 1.25 and older.
    payload = crossplane.parse(str(path), single=True)
    assert payload["status"] == "ok", payload["errors"]
    return flat(payload["config"][0]["parsed"])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.22.1", "1.22.1"),
        ("nginx version: nginx/1.24.0 (Ubuntu)", "1.24.0"),
        ("nginx version: openresty/1.27.1.2", "1.27.1"),
        ("2:1.26.3-1.el10", "1.26.3"),
        ("1.30.2-1~bookworm", "1.30.2"),
        ("1:1.20.1-22.el9_6.3", "1.20.1"),
    ],
)
def test_versions_of_programs_and_packages_are_read(text: str, version: str) -> None:
    assert str(nginx_versions.parse(text)) == version


@pytest.mark.parametrize("text", ["", "nginx: command not found", "package nginx is not installed"])
def test_what_is_no_version_is_none(text: str) -> None:
    assert nginx_versions.parse(text) is None


def test_versions_are_compared_as_numbers() -> None:
    assert Version(1, 9, 15) < Version(1, 10) < Version(1, 10, 1) < Version(1, 30)


@pytest.mark.parametrize(
    ("wanted", "version", "inside"),
    [
        ("1.26", Version(1, 26, 3), True),
        ("1.26.3", Version(1, 26, 3), True),
        ("1.26.3", Version(1, 26, 2), False),
        ("1.2", Version(1, 26, 3), False),  # compared by numbers, not by letters
    ],
)
def test_a_series_and_a_release_are_told_apart(
    wanted: str, version: Version, *, inside: bool
) -> None:
    assert version.is_in(wanted) is inside


@pytest.mark.parametrize(
    ("candidates", "wanted", "chosen"),
    [
        (["1:1.26.2-1.el9", "1:1.26.3-1.el9", "1:1.28.0-1.el9"], "1.26", "1:1.26.3-1.el9"),
        (["1:1.26.3-9.el9.ngx", "1:1.26.3-10.el9.ngx"], None, "1:1.26.3-10.el9.ngx"),
        # The epochs of two sources say nothing about their versions.
        (["2:1.26.3-1.el10", "1:1.30.2-1.el10.ngx"], None, "1:1.30.2-1.el10.ngx"),
        (["1.22.1-9", "1.22.1-9+deb12u3"], "1.22", "1.22.1-9+deb12u3"),
        (["1.28.0-1~rc1", "1.28.0-1"], None, "1.28.0-1"),
        (["1:1.20.1-1.el9"], "1.30", None),
        ([], None, None),
    ],
)
def test_the_newest_package_that_is_allowed_is_chosen(
    candidates: list[str], wanted: str | None, chosen: str | None
) -> None:
    assert nginx_versions.newest(candidates, wanted) == chosen
    assert nginx_versions.newest(reversed(candidates), wanted) == chosen


def test_a_feature_is_there_from_its_release_on() -> None:
    assert not nginx_versions.abilities(Version(1, 25, 0))["http2_directive"]
    assert nginx_versions.abilities(Version(1, 25, 1))["http2_directive"]


@pytest.mark.parametrize("version", ["1.20.1", "1.22.1", "1.25.0"])
def test_http2_is_a_parameter_of_listen_before_it_is_a_directive(
    tmp_path: Path, version: str
) -> None:
    found = rendered(tmp_path, version, http2=True, **TLS)
    assert "http2" not in dict(found)
    assert [args for name, args in found if name == "listen" and "http2" in args] == [
        ["8443", "ssl", "http2", "default_server", "so_keepalive=on"]
    ]


@pytest.mark.parametrize("version", ["1.25.1", "1.26.3", "1.30.2"])
def test_http2_is_a_directive_of_the_tls_server_alone(tmp_path: Path, version: str) -> None:
    found = rendered(tmp_path, version, http2=True, **TLS)
    assert [args for name, args in found if name == "http2"] == [["on"]]
    assert not [args for name, args in found if name == "listen" and "http2" in args]


def test_http2_is_off_until_it_is_asked_for(tmp_path: Path) -> None:
    assert "http2" not in dict(rendered(tmp_path, "1.30.2", **TLS))


def test_a_cookie_binds_clients_to_workers_after_the_method_and_before_keepalive(
    tmp_path: Path,
) -> None:
    found = rendered(tmp_path, "1.30.2", upstream_sticky="worker")
    assert ("sticky", ["cookie", "worker", "path=/", "httponly"]) in found
    order = [name for name, _ in found if name in ("least_conn", "sticky", "keepalive")]
    assert order == ["least_conn", "sticky", "keepalive"]
    by_tls = dict(rendered(tmp_path, "1.30.2", upstream_sticky="w", tls_only=True, **TLS))
    assert by_tls["sticky"][-1] == "secure"


@pytest.mark.parametrize("version", ["1.14.0", "1.20.1", "1.30.2"])
def test_upstreams_are_spoken_to_alike_whatever_the_defaults(tmp_path: Path, version: str) -> None:
    found = rendered(tmp_path, version)
    assert ("proxy_http_version", ["1.1"]) in found
    assert ("keepalive", ["1000"]) in found


def test_what_the_oldest_does_not_know_is_left_out(tmp_path: Path) -> None:
    log = {"access_log_format": "json"}
    old, new = rendered(tmp_path, "1.14.1", **log), rendered(tmp_path, "1.20.1", **log)
    assert "proxy_socket_keepalive" not in dict(old)
    assert dict(new)["proxy_socket_keepalive"] == ["on"]
    formats = [
        "".join(args)
        for found in (old, new)
        for name, args in found
        if name == "log_format" and args[0] == "json"
    ]
    assert ["upstream_bytes_sent" in text for text in formats] == [False, True]


def test_a_setting_that_the_pinned_version_cannot_do_is_refused_with_the_one_that_can() -> None:
    (problem,) = problems(gateway(nginx_version="1.26", upstream_sticky="w"), worker())
    assert "nginx_version is 1.26" in problem
    assert "upstream_sticky needs nginx 1.29.6 or newer" in problem
    # A series may come to it: its releases are known on the host only.
    assert fleet(gateway(nginx_version="1.29", upstream_sticky="w"), worker())


def test_a_version_that_the_template_does_not_know_is_refused() -> None:
    (problem,) = problems(gateway(nginx_version="1.12.2"), worker())
    assert "1.12.2 is older than 1.14.0" in problem


def test_a_number_is_no_version() -> None:
    """1.30 would be 1.3."""
    (problem,) = problems(gateway(nginx_version=1.30), worker())
    assert "nginx_version" in problem
    assert "it is 1.3" in problem


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"http2": True}, "http2: there is no certificate"),
        ({"upstream_sticky": "w", "upstream_balance": "ip_hash"}, "choose one"),
        ({"upstream_sticky": "w; x"}, "upstream_sticky"),
        ({"nginx_package": "nginx=1.26.3"}, "nginx_package"),
        ({"nginx_version": "1"}, "nginx_version"),
    ],
)
def test_what_makes_no_sense_is_refused(data: dict[str, Any], message: str) -> None:
    assert message in "\n".join(problems(gateway(**data), worker()))


def test_rendering_for_a_version_that_cannot_do_it_is_an_error() -> None:
    found = fleet(gateway(upstream_sticky="w"), worker())
    with pytest.raises(rendering.RenderError, match=r"needs nginx 1\.29\.6"):
        rendering.nginx_conf(found.gateways["gw1"], found, version=Version(1, 22, 1))


def test_every_version_that_makes_a_difference_is_rendered_before_a_deploy() -> None:
    rendering.check_all(fleet(gateway(http2=True, **TLS), worker()))
    rendering.check_all(fleet(gateway(upstream_sticky="w"), worker()))
    since = {arrival.since for arrival in nginx_versions.ARRIVALS.values()}
    assert since <= set(nginx_versions.MILESTONES)
    assert set(nginx_versions.ARRIVALS) == set(Feature)


def test_the_table_in_the_docs_is_this_one() -> None:
    committed = (CHECKOUT / "docs" / "nginx-versions.md").read_text()
    assert committed == nginx_versions.reference(), "run `make docs`"
