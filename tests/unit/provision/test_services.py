"""Several services: where each is found, what runs it, and what cannot be together.

What nginx and hosts make of it is in tests/deploy/test_services.py.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crossplane
import pytest

from provision import facts, preflight, rendering
from provision.settings import Fleet, HostInput, InvalidFleetError, parse_fleet
from tests.unit.provision import fleets
from tests.unit.provision.fleets import gateway, worker
from tests.unit.provision.test_nginx_conf import Directive, block, flat
from tests.unit.provision.test_settings import problems

BY_PATH = {
    "digits": {"model": "models/digits", "path": "/digits"},
    "words": {"model": "models/words", "path": "/words", "workers": ["gpu2"]},
}
MIXED = {
    "digits": {"model": "models/digits"},
    "words": {
        "model": "models/words",
        "path": "/words",
        "worker_ports": [9105],
        "allowed_origins": ["https://words.example"],
        "client_max_connections": 0,
        "client_handshakes_per_s": 7,
    },
    "named": {
        "model": "models/digits",
        "server_names": ["digits.example", "*.digits.example"],
        "worker_ports": [9205],
    },
    "named_words": {
        "model": "models/words",
        "path": "/words",
        "server_names": ["digits.example"],
        "worker_ports": [9305],
    },
}
CERTIFICATE = {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"}


def fleet(services: dict[str, Any], *, gateway: Any = None, worker: Any = None) -> Fleet:
    """A gateway and two worker hosts."""
    return fleets.fleet(*_hosts(services, gateway=gateway, worker=worker))


def _hosts(services: dict[str, Any], gateway: Any = None, worker: Any = None) -> list[HostInput]:
    return [
        fleets.gateway(services=services, **(gateway or {})),
        fleets.worker(services=services, **(worker or {})),
        fleets.worker("gpu2", "10.0.0.22", services=services, **(worker or {})),
    ]


def refused(services: dict[str, Any], **data: Any) -> list[str]:
    return problems(*_hosts(services, **data))


def http(found: Fleet, tmp_path: Path) -> list[Directive]:
    path = tmp_path / "nginx.conf"
    path.write_bytes(rendering.nginx_conf(found.gateways["gw1"], found))
    payload = crossplane.parse(str(path), single=True, check_ctx=True)
    assert payload["status"] == "ok", payload["errors"]
    return block(payload["config"][0]["parsed"], ("http",))


def servers(directives: list[Directive]) -> dict[str, dict[str, list[Directive]]]:
    """Locations by path, by the names of their server."""
    found = {}
    for server in (d["block"] for d in directives if d["directive"] == "server"):
        names = next(" ".join(d["args"]) for d in server if d["directive"] == "server_name")
        found[names] = {
            " ".join(d["args"]): d["block"] for d in server if d["directive"] == "location"
        }
    return found


# ---- what runs where ----------------------------------------------------------------------------


def test_a_service_has_its_own_upstream_of_the_hosts_that_run_it(tmp_path: Path) -> None:
    found = http(
        fleet({**BY_PATH, "words": {**BY_PATH["words"], "worker_ports": [9105]}}), tmp_path
    )
    addresses = {
        name: [
            d["args"][0]
            for d in block(found, ("upstream", f"wsbackend_{name}"))
            if d["directive"] == "server"
        ]
        for name in BY_PATH
    }
    assert addresses == {
        "digits": ["10.0.0.21:9005", "10.0.0.21:9006", "10.0.0.22:9005", "10.0.0.22:9006"],
        "words": ["10.0.0.22:9105"],
    }


def test_what_a_service_does_not_say_is_as_its_hosts_say() -> None:
    services = {
        "digits": {"model": "models/digits", "path": "/digits"},
        "words": {
            "model": "models/words",
            "path": "/words",
            "worker_ports": [9105],
            "service_options": {"max_batch": 8},
            "worker_tokens": "",
        },
    }
    worker = {
        "worker_tokens": "tokens",
        "service_options": {"max_batch": 32, "max_queue": 99},
        "worker_ports": [9005],
    }
    found = fleet(services, worker=worker)
    digits, words = (a.settings for a in found.assignments(found.workers["gpu1"]))
    assert (digits.model, words.model) == ("models/digits", "models/words")
    assert (digits.ports, words.ports) == ((9005,), (9105,))
    assert (digits.worker_tokens, words.worker_tokens) == ("tokens", None)
    assert digits.service_options == {"max_batch": 32, "max_queue": 99}
    assert words.service_options == {"max_batch": 8, "max_queue": 99}


def test_without_services_there_is_one_at_the_root() -> None:
    found = fleets.fleet()
    (site,) = found.sites(found.gateways["gw1"])
    (route,) = site.routes
    assert (route.path, route.suffix, site.is_default) == ("/", "", True)
    (assignment,) = found.assignments(found.workers["gpu1"])
    assert assignment.settings is found.workers["gpu1"]


def test_systemd_keeps_the_socket_of_the_only_worker_of_a_service() -> None:
    found = fleet({**BY_PATH, "words": {**BY_PATH["words"], "worker_ports": [9105]}})
    kept = {a.service: found.keeps_sockets(a) for a in found.assignments(found.workers["gpu2"])}
    assert kept == {"digits": False, "words": True}


def test_the_service_with_the_fewest_workers_counts_for_the_size() -> None:
    alone = {**BY_PATH, "words": {**BY_PATH["words"], "worker_ports": [9105]}}
    found = fleet(alone, gateway={"connections": 1000})
    demand = rendering.demand(found.gateways["gw1"], found, cores=4)
    assert demand is not None
    assert (demand.workers, demand.keepalive) == (1, 2000)


# ---- ports from GPUs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "gpus", "ports"),
    [
        ({}, {}, (9005,)),  # not asked yet
        ({}, {"gpu1": 4}, (9005, 9006, 9007, 9008)),
        ({}, {"gpu1": 0}, (9005,)),
        ({"worker_device": "cpu"}, {"gpu1": 4}, (9005,)),
        ({"first_worker_port": 7000}, {"gpu1": 2}, (7000, 7001)),
    ],
)
def test_a_host_has_as_many_ports_as_gpus(
    data: dict[str, Any], gpus: dict[str, int], ports: tuple[int, ...]
) -> None:
    found = fleets.fleet(gateway(), worker(worker_ports="per-gpu", **data))
    assert found.asked_for_gpus() == ["gpu1"]
    known = found.with_gpus(gpus)
    assert known.workers["gpu1"].ports == ports
    assert known.upstream_servers() == [f"10.0.0.21:{port}" for port in ports]


def test_each_service_has_a_port_a_gpu_from_a_first_one_of_its_own() -> None:
    services = {
        "digits": BY_PATH["digits"],
        "words": {**BY_PATH["words"], "first_worker_port": 9105},
    }
    found = fleet(services, worker={"worker_ports": "per-gpu"})
    known = found.with_gpus({"gpu1": 2, "gpu2": 3})
    assert known.ports(known.workers["gpu1"]) == [9005, 9006]
    assert known.ports(known.workers["gpu2"]) == [9005, 9006, 9007, 9105, 9106, 9107]


def test_ports_that_clash_or_end_once_the_gpus_are_known_are_refused() -> None:
    services = {
        "digits": BY_PATH["digits"],
        "words": {**BY_PATH["words"], "first_worker_port": 9007},
    }
    found = fleet(services, worker={"worker_ports": "per-gpu"})
    with pytest.raises(InvalidFleetError, match=r"port 9007 on 10\.0\.0\.22: wanted by gpu2"):
        found.with_gpus({"gpu2": 3})
    found = fleets.fleet(gateway(), worker(worker_ports="per-gpu", first_worker_port=65535))
    with pytest.raises(InvalidFleetError, match="gpu1: 2 ports from first_worker_port on end"):
        found.with_gpus({"gpu1": 2})


class FakeInventory:
    """Hosts that answer how many GPUs they have; None: not connected."""

    def __init__(self, gpus: dict[str, int | None]) -> None:
        self.gpus = gpus

    def get_host(self, name: str) -> SimpleNamespace:
        count = self.gpus[name]
        return SimpleNamespace(
            connected=count is not None,
            get_fact=lambda _: facts.Hardware(nvidia_gpus=count or 0),
        )


def test_all_hosts_whose_ports_follow_from_gpus_are_asked() -> None:
    asked = fleets.fleet(gateway(), worker(worker_ports="per-gpu"))
    known = preflight._with_gpus(asked, FakeInventory({"gpu1": 3}))  # type: ignore[arg-type]
    assert known.workers["gpu1"].ports == (9005, 9006, 9007)
    with pytest.raises(preflight.RefusedError, match=r"gpu1: .* not connected, so its GPUs"):
        preflight._with_gpus(asked, FakeInventory({"gpu1": None}))  # type: ignore[arg-type]


# ---- how clients get there ----------------------------------------------------------------------


def test_paths_and_names_lead_to_their_services_and_to_nothing_else(tmp_path: Path) -> None:
    found = servers(http(fleet(MIXED), tmp_path))
    passed = {
        names: {
            place: directive["args"][0]
            for place, locations in by_place.items()
            for directive in locations
            if directive["directive"] == "proxy_pass"
        }
        for names, by_place in found.items()
    }
    assert passed == {
        "localhost": {
            "/": "http://wsbackend_digits",
            "= /words": "http://wsbackend_words/",
            "/words/": "http://wsbackend_words/",
        },
        "digits.example": {
            "/": "http://wsbackend_named",
            "= /words": "http://wsbackend_named_words/",
            "/words/": "http://wsbackend_named_words/",
        },
        "*.digits.example": {"/": "http://wsbackend_named"},
    }


def test_only_the_first_server_of_a_port_says_how_it_listens(tmp_path: Path) -> None:
    found = fleet(MIXED, gateway=CERTIFICATE)
    listens = [args for name, args in flat(http(found, tmp_path)) if name == "listen"]
    assert listens == [
        ["8009", "default_server", "so_keepalive=on"],
        ["8009"],
        ["8009"],
        ["8443", "ssl", "default_server", "so_keepalive=on"],
        ["8443", "ssl"],
        ["8443", "ssl"],
    ]


def test_what_no_service_is_at_is_not_found(tmp_path: Path) -> None:
    named = {"digits": {"model": "models/digits", "server_names": ["digits.example"]}}
    found = servers(http(fleet(named), tmp_path))
    assert [(d["directive"], d["args"]) for d in found["localhost"]["/"]] == [("return", ["404"])]


def test_counters_are_hidden_below_every_path(tmp_path: Path) -> None:
    for locations in servers(http(fleet(MIXED), tmp_path)).values():
        for place in [place for place in locations if place.startswith("= /words")] or ["= "]:
            prefix = place.removeprefix("= ").removesuffix("/metrics")
            for hidden in (f"= {prefix}/metrics", f"{prefix}/metrics/"):
                assert [d["args"] for d in locations[hidden]] == [["404"]]


def test_limits_and_origins_are_each_services_own(tmp_path: Path) -> None:
    hard = {"client_max_connections": 9, "allowed_origins": ["https://all.example"]}
    found = http(fleet(MIXED, gateway=hard), tmp_path)
    zones = [d["args"][1] for d in found if d["directive"].endswith("_zone")]
    assert zones == [
        *(f"zone=client_connections_{name}:10m" for name in ("digits", "named", "named_words")),
        "zone=client_handshakes_words:10m",
    ]
    words = dict(flat(servers(found)["localhost"]["/words/"]))
    assert "limit_conn" not in words
    assert words["limit_req"] == ["zone=client_handshakes_words", "burst=14", "nodelay"]
    digits = dict(flat(servers(found)["localhost"]["/"]))
    assert digits["limit_conn"] == ["client_connections_digits", "9"]
    maps = {d["args"][1]: d["block"] for d in found if d["directive"] == "map"}
    assert "https://words.example" in [d["directive"] for d in maps["$refused_origin_words"]]
    assert "https://all.example" in [d["directive"] for d in maps["$refused_origin_digits"]]


def test_each_service_is_probed_at_one_place() -> None:
    found = fleet(MIXED)
    assert found.probe(found.gateways["gw1"]) == (
        "8009,8009/words,8009@digits.example,8009@digits.example/words"
    )
    hard = fleet(MIXED, gateway={"profile": "hardened", **CERTIFICATE})
    assert hard.probe(hard.gateways["gw1"]).startswith("tls:8443,tls:8443/words,")


@pytest.mark.parametrize(
    ("served", "before", "after", "lost"),
    [
        ("8009/a,8009/b", "8009/a,8009/b", "8009/a,8009/b", ""),
        ("8009/a", "8009/a,8009/b", "8009/a,8009/b", "8009/b"),
        # One that was not served before is no fault of the change, and hides no other.
        ("8009/b", "8009/b", "8009/a,8009/b 403", ""),
        ("8009/c", "8009/b", "8009/b,8009/c", "8009/b"),
    ],
)
def test_a_change_is_to_blame_for_the_places_that_it_lost(
    served: str, before: str, after: str, lost: str
) -> None:
    """`before`: places that answered before the change; `after`: those of the new configuration,
    of which `served` answer.
    """
    stand_in = (
        'handshake_status() { [[ ,$served, != *",$1,"* ]] || echo "HTTP/1.1 101 x"; }; '
        "sleep() { :; }; served=$1; "
    )
    told = (
        'silent_before=$(without "$(places_of 8009/a,8009/b)" "$(places_of "$2")"); '
        'clients_are_served "$3" && [[ -z $lost ]] || echo "$lost"'
    )
    text = rendering.shell("handshake.sh") + stand_in + told
    result = subprocess.run(
        ["bash", "-uc", text, "x", served, before, after],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == lost


@pytest.mark.parametrize(
    ("place", "request_line", "host"),
    [
        ("{port}", "GET / HTTP/1.1", "localhost"),
        ("{port}/digits", "GET /digits HTTP/1.1", "localhost"),
        ("{port}@a.example/x/y", "GET /x/y HTTP/1.1", "a.example"),
    ],
)
def test_a_place_is_asked_for_by_its_name_and_path(
    place: str, request_line: str, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        place = place.format(port=listener.getsockname()[1])
        text = rendering.shell("handshake.sh") + 'handshake_status "$1"'
        asking = subprocess.Popen(
            ["bash", "-c", text, "x", place], stdout=subprocess.PIPE, text=True
        )
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as reading:
            head = b"".join(iter(reading.readline, b"\r\n")).decode().splitlines()
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            output, _ = asking.communicate(timeout=30)
    assert head[0] == request_line
    assert f"Host: {host}" in head
    assert output == "HTTP/1.1 101 Switching Protocols\n"


@pytest.mark.parametrize("data", [{}, {"profile": "hardened", **CERTIFICATE}])
def test_gixy_and_our_own_lint_have_nothing_against_it(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    found = fleet(MIXED, gateway=data)
    rendering.check_all(found)
    if importlib.util.find_spec("gixy") is None:
        pytest.skip("gixy-next is not installed (requirements/dev.txt)")
    path = tmp_path / "nginx.conf"
    path.write_bytes(rendering.nginx_conf(found.gateways["gw1"], found))
    skipped = "--skips=ssl_stapling_without_resolver"
    command = [str(Path(sys.executable).with_name("gixy")), skipped, "--disable-includes", path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- what cannot be together --------------------------------------------------------------------


def test_all_conflicts_are_in_one_list() -> None:
    services = {
        "digits": {"model": "models/digits", "path": "/a", "workers": ["gpu1", "gpu3"]},
        "words": {"model": "models/words", "path": "/a", "workers": ["gpu1"]},
        "signs": {
            "model": "models/signs",
            "path": "/a/v2/x",
            "server_names": ["localhost"],
            "worker_ports": [9005],
            "service_options": {"max_bach": 1},
        },
    }
    found = refused(services)
    expected = [
        "services digits and words are both at /a; give one of them another path, or server_names "
        "of its own",
        "services.digits.workers: the group workers has no host gpu3; did you mean gpu2?",
        "services.signs.path: /a/v2 is answered by the workers of digits; choose another",
        "services.signs.server_names: localhost is server_name of gw1, under which services "
        "without server_names are found; leave it out",
        "services.signs: service_options.max_bach: the service has no such option; did you mean "
        "max_batch?",
        "port 9005 on 10.0.0.21: wanted by gpu1 worker_ports of service digits and by gpu1 "
        "worker_ports of service words; give one of the two worker_ports of its own",
    ]
    assert [line for line in expected if line not in found] == []


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ({"path": "/a"}, "services.x.model: Field required"),
        ({"model": "m", "path": "a"}, "services.x.path"),
        ({"model": "m", "path": "/a/"}, "services.x.path"),
        ({"model": "m", "path": "/a/../b"}, "services.x: path '/a/../b' has . or .. in it"),
        ({"model": "m", "path": "/a;b"}, "services.x.path"),
        ({"model": "m", "path": "/.well-known/y"}, "/.well-known is answered by nginx itself"),
        ({"model": "m", "server_names": ["~^x$"]}, "services.x.server_names.0"),
        ({"model": "m", "modle": "m"}, "services.x.modle"),
        ({"model": "m", "workers": ["gpu1"]}, "gpu2: runs no service"),
    ],
)
def test_what_a_service_may_not_say(service: dict[str, Any], message: str) -> None:
    found = refused({"x": service})
    assert any(message in line for line in found), found
    assert len(found) == len(set(found))


def test_models_that_are_not_there_are_named_each_once() -> None:
    found = preflight._bundle_problems(_hosts(MIXED))
    assert len(found) == len({line.partition(":")[0] for line in found})
    assert any(line.startswith("model models/words: ") for line in found)
    assert not any("None" in line for line in preflight._bundle_problems(_hosts({"x": {}})))


@pytest.mark.parametrize("name", ["Digits", "my-model", "a b", ""])
def test_names_of_services_are_names_of_variables(name: str) -> None:
    assert any("services" in line for line in refused({name: {"model": "m"}}))


def test_all_hosts_have_to_say_the_same_services() -> None:
    with pytest.raises(InvalidFleetError, match=r"gpu1: services differs from that of gw1"):
        parse_fleet([gateway(services=BY_PATH), worker()], resolve={})


def test_backups_need_somebody_of_their_own_service_to_back_up() -> None:
    hosts = [
        gateway(services=BY_PATH),
        worker(services=BY_PATH),
        worker("gpu2", "10.0.0.22", services=BY_PATH, backup=True, worker_ports=[9105]),
    ]
    services = {**BY_PATH, "digits": {**BY_PATH["digits"], "workers": ["gpu1"]}}
    for host in hosts:
        host.data["services"] = services  # type: ignore[index]
    assert any("service words: all workers are backups" in line for line in problems(*hosts))


# ---- a host that is gateway and worker ----------------------------------------------------------


def shared(**data: Any) -> Fleet:
    """One host that is both, and one worker beside it."""
    both = HostInput(
        name="one",
        groups=frozenset({"gateways", "workers"}),
        data={"address": "10.0.0.5", "unix_sockets": True, **data},
    )
    return fleets.fleet(both, gateway(), worker(unix_sockets=True))


def test_nginx_reaches_the_workers_of_its_own_host_by_unix_sockets() -> None:
    found = shared()
    own = [u.address for u in found.routes(found.gateways["one"])[0].upstreams]
    assert own == [
        *("unix:/run/gpu-workers/9005.sock", "unix:/run/gpu-workers/9006.sock"),
        *("10.0.0.21:9005", "10.0.0.21:9006"),
    ]
    decided = found.gateways["one"].model_copy(update={"tls_stapling": False})
    assert [u.address for u in found.routes(decided)[0].upstreams] == own
    others = [u.address for u in found.routes(found.gateways["gw1"])[0].upstreams]
    assert others == ["10.0.0.5:9005", "10.0.0.5:9006", "10.0.0.21:9005", "10.0.0.21:9006"]
    without = shared(unix_sockets=False)
    addresses = [u.address for u in without.routes(without.gateways["one"])[0].upstreams]
    assert not any(address.startswith("unix:") for address in addresses)


def test_units_of_a_host_that_is_both_have_sockets_for_nginx_alone() -> None:
    found = shared(nginx_user="nginx")

    def unit(host: str, kind: str) -> str:
        values = rendering.unit_values(found.workers[host], found)
        placeholders = rendering.unit_placeholders()
        return rendering.render(f"gpu-worker@.{kind}.j2", **placeholders, **values).decode()

    assert "ReadWritePaths=-/run/gpu-workers\n" in unit("one", "service")
    assert (
        "ListenStream=0.0.0.0:%i\n"
        "# For the nginx of this host, and nobody else.\n"
        "ListenStream=/run/gpu-workers/%i.sock\n"
        "SocketUser=gpu-service\nSocketGroup=nginx\nSocketMode=0660\n"
    ) in unit("one", "socket")
    for kind in ("service", "socket"):
        assert "/run/gpu-workers" not in unit("gpu1", kind)


def test_enforcing_denies_unix_sockets() -> None:
    both = HostInput(
        name="one",
        groups=frozenset({"gateways", "workers"}),
        data={
            "address": "10.0.0.5",
            "unix_sockets": True,
            "selinux_mode": "enforcing",
            "selinux_allow_connect": True,
        },
    )
    assert any("'enforcing' denies nginx the workers' Unix sockets" in p for p in problems(both))


def test_a_worker_is_looked_for_where_its_service_is() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Host']} {self.path}")
            body = b'{"worker":"gpu1:9105"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not to stderr."""

    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        place = f"{server.server_port}@words.example/words"
        script = rendering.shell("worker-seen.sh")
        subprocess.run(["bash", "-c", script, "x", place, "20", "gpu1:9105"], check=True)
        thread.join(timeout=30)
    assert asked == [f"words.example:{server.server_port} /words/v2"]
