"""The rendered nginx.conf, parsed by crossplane: what the gateway says, and the mended faults.

What a real nginx makes of it is in tests/deploy.
"""

from pathlib import Path
from typing import Any

import crossplane
import pytest

from provision import rendering
from tests.unit.provision.fleets import fleet, gateway, worker

Directive = dict[str, Any]


def parsed(tmp_path: Path, **settings: Any) -> list[Directive]:
    found = fleet(gateway(**settings), worker(), worker("gpu2", "10.0.0.22", worker_ports=[9005]))
    text = rendering.nginx_conf(found.gateways["gw1"], found)
    path = tmp_path / "nginx.conf"
    path.write_bytes(text)
    payload = crossplane.parse(str(path), single=True, check_ctx=True)
    assert payload["status"] == "ok", payload["errors"]
    directives: list[Directive] = payload["config"][0]["parsed"]
    return directives


def flat(directives: list[Directive]) -> list[tuple[str, list[str]]]:
    found = []
    for directive in directives:
        found.append((directive["directive"], directive["args"]))
        found += flat(directive.get("block", []))
    return found


def block(directives: list[Directive], *path: tuple[str, ...]) -> list[Directive]:
    for name, *args in path:
        matches = [
            d for d in directives if d["directive"] == name and d["args"][: len(args)] == args
        ]
        assert matches, f"no {name} {args} among {[d['directive'] for d in directives]}"
        directives = matches[0]["block"]
    return directives


def test_says_what_the_reference_says(tmp_path: Path) -> None:
    found = flat(parsed(tmp_path))
    for expected in [
        ("user", ["root"]),
        ("worker_processes", ["auto"]),
        ("error_log", ["/var/log/nginx/error.log"]),
        ("access_log", ["/var/log/nginx/access.log", "main"]),
        ("pid", ["/run/nginx.pid"]),
        ("include", ["/usr/share/nginx/modules/*.conf"]),
        ("include", ["/etc/nginx/conf.d/*.conf"]),
        ("include", ["/etc/nginx/default.d/*.conf"]),
        ("sendfile", ["on"]),
        ("tcp_nopush", ["on"]),
        ("tcp_nodelay", ["on"]),
        ("keepalive_timeout", ["65"]),
        ("types_hash_max_size", ["2048"]),
        ("keepalive", ["1000"]),
        ("server_name", ["localhost"]),
        ("root", ["/usr/share/nginx/html"]),
        ("proxy_pass", ["http://wsbackend"]),
        ("proxy_http_version", ["1.1"]),
        ("proxy_read_timeout", ["3600s"]),
    ]:
        assert expected in found
    listens = [args for name, args in found if name == "listen"]
    assert [args[:2] for args in listens] == [["8009", "default_server"]]


def test_upstream_lists_every_worker_and_the_method_stands_before_keepalive(
    tmp_path: Path,
) -> None:
    upstream = block(parsed(tmp_path), ("http",), ("upstream", "wsbackend"))
    servers = [d["args"][0] for d in upstream if d["directive"] == "server"]
    assert servers == ["10.0.0.21:9005", "10.0.0.21:9006", "10.0.0.22:9005"]
    order = [d["directive"] for d in upstream]
    assert order.index("least_conn") < order.index("keepalive")


def test_connection_header_follows_the_client_and_only_websocket_is_forwarded(
    tmp_path: Path,
) -> None:
    http = block(parsed(tmp_path), ("http",))
    maps = {d["args"][1]: dict(_pairs(d["block"])) for d in http if d["directive"] == "map"}
    assert all(d["args"][0] == "$http_upgrade" for d in http if d["directive"] == "map")
    # An empty value removes the header, and keeps the upstream's keepalive working.
    assert maps["$connection_upgrade"] == {"default": "", "websocket": "upgrade"}
    assert maps["$forwarded_upgrade"] == {"default": "", "websocket": "websocket"}
    assert maps["$refused_upgrade"] == {"default": "1", "websocket": "0", "": "0"}
    headers = [args for name, args in flat(block(http, ("server",))) if name == "proxy_set_header"]
    assert ["Connection", "$connection_upgrade"] in headers
    assert ["Upgrade", "$forwarded_upgrade"] in headers


def _pairs(directives: list[Directive]) -> list[tuple[str, str]]:
    return [(d["directive"], d["args"][0]) for d in directives]


def test_error_pages_are_the_ones_that_the_locations_serve(tmp_path: Path) -> None:
    server = block(parsed(tmp_path), ("http",), ("server",))
    pages = {d["args"][-1] for d in server if d["directive"] == "error_page"}
    served = {d["args"][-1] for d in server if d["directive"] == "location"}
    assert pages == {"/404.html", "/50x.html"}
    assert pages <= served


def test_descriptors_suffice_for_the_connections(tmp_path: Path) -> None:
    found = dict(flat(parsed(tmp_path, worker_connections=4000)))
    assert int(found["worker_rlimit_nofile"][0]) >= 2 * int(found["worker_connections"][0])
    found_fleet = fleet(gateway(worker_connections=4000), worker())
    limits = rendering.nginx_unit(found_fleet.gateways["gw1"], found_fleet).decode()
    assert f"LimitNOFILE={found['worker_rlimit_nofile'][0]}" in limits


def test_tls_is_off_until_it_has_a_certificate(tmp_path: Path) -> None:
    assert not [name for name, _ in flat(parsed(tmp_path)) if name.startswith("ssl_")]
    found = flat(
        parsed(tmp_path, tls_certificate="/etc/pki/gw.pem", tls_certificate_key="/etc/pki/gw.key")
    )
    assert ("ssl_protocols", ["TLSv1.2", "TLSv1.3"]) in found
    assert ["8443", "ssl", "default_server", "so_keepalive=on"] in [
        args for name, args in found if name == "listen"
    ]
    # Both servers proxy alike.
    assert [name for name, _ in found].count("proxy_pass") == 2


def test_shutdown_timeout_is_a_decision(tmp_path: Path) -> None:
    assert "worker_shutdown_timeout" not in dict(flat(parsed(tmp_path)))
    found = dict(flat(parsed(tmp_path, worker_shutdown_timeout_s=30)))
    assert found["worker_shutdown_timeout"] == ["30s"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user {{ gateway.nginx_usr }};\n", "nginx.conf.j2:1: .*nginx_usr"),
        ("\n{% if %}\n", "nginx.conf.j2:2: "),
    ],
)
def test_a_broken_template_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    (tmp_path / "nginx.conf.j2").write_text(text)
    monkeypatch.setattr(rendering, "TEMPLATES", tmp_path)
    rendering._environment.cache_clear()
    found = fleet()
    try:
        with pytest.raises(rendering.RenderError, match=expected):
            rendering.nginx_conf(found.gateways["gw1"], found)
    finally:
        rendering._environment.cache_clear()
