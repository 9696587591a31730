"""How facts read what hosts print."""

from provision import facts
from provision.facts import FileState, Hardware, SelinuxMode, SelinuxState, UnitState


def test_file_states() -> None:
    digest = "ab" * 32
    lines = ["644 root root", f"{digest}  -", "/etc/a b.conf"]
    assert facts.FileStates().process(lines) == {
        "/etc/a b.conf": FileState(mode="644", user="root", group="root", sha256=digest)
    }


def test_selinux_booleans_now_and_at_the_next_boot() -> None:
    output = ["a --> on", "b --> off", "c --> on", "# kept by libsemanage", "a=1", "b=0"]
    assert facts.SelinuxBooleans().process(output) == {
        "a": facts.BooleanState(active=True, permanent=True),
        "b": facts.BooleanState(active=False, permanent=False),
        "c": facts.BooleanState(active=True, permanent=False),
    }


def test_selinux_ports_are_ranges_of_tcp() -> None:
    output = [
        "http_port_t                    tcp      80, 8008-8009",
        "http_port_t                    udp      443",
    ]
    assert facts.SelinuxPorts().process(output) == [
        facts.PortRange(type="http_port_t", first=80, last=80),
        facts.PortRange(type="http_port_t", first=8008, last=8009),
    ]


def test_what_a_command_says_yes_to() -> None:
    assert facts.LacksSemanage().process(["yes"])
    assert not facts.SlurmAnswers().process([])


def test_selinux_running_and_configured() -> None:
    assert facts.Selinux().process(["Enforcing", "permissive"]) == SelinuxState(
        running=SelinuxMode.ENFORCING, configured=SelinuxMode.PERMISSIVE
    )
    assert facts.Selinux().process(["absent"]).running is SelinuxMode.ABSENT


def test_firewalld_ports_and_rules() -> None:
    rule = 'rule family="ipv4" source address="10.0.0.11" port port="9005" protocol="tcp" accept'
    escaped = rule.replace('"', '\\"')
    found = facts.Firewalld().process(
        [
            'runtime aas 2 2 "8009" "tcp" 2 "443" "tcp"',
            "runtime as 0",
            "permanent a(ss) 0",
            f'permanent as 1 "{escaped}"',
        ]
    )
    assert found.runtime == {"8009/tcp", "443/tcp"}
    assert found.permanent == {rule}


def test_newest_first_by_folder() -> None:
    assert facts.NewestFirst().process(["/a/", "3", "2", "/b/"]) == {"/a": ["3", "2"], "/b": []}


def test_unit_states_tell_what_the_process_was_started_with() -> None:
    found = facts.UnitStates().process(
        [
            "unit=gpu-worker@9005.service",
            "now=1795901501",
            "ActiveEnterTimestamp=Sat 2026-11-28 21:31:30 UTC",
            "MainPID=812",
            "ActiveState=active",
            "SubState=running",
            "UnitFileState=enabled",
            "NeedDaemonReload=yes",
            "GPU_SERVICE_DEPLOYMENT=abc",
            "unit=gpu-worker@9006.service",
            "now=1795901501",
            "ActiveEnterTimestamp=Sat 2026-11-28 21:31:30 UTC",
            "MainPID=0",
            "ActiveState=failed",
            "SubState=failed",
            "UnitFileState=disabled",
            "NeedDaemonReload=no",
        ]
    )
    assert found["gpu-worker@9005.service"] == UnitState(
        active="active",
        sub="running",
        enabled=True,
        needs_daemon_reload=True,
        main_pid=812,
        deployment="abc",
        up_s=10.0,
    )
    assert found["gpu-worker@9006.service"].active == "failed"
    assert found["gpu-worker@9006.service"].deployment == ""
    assert found["gpu-worker@9006.service"].up_s is None


def test_hardware_counts_gpus_that_the_driver_serves() -> None:
    lines = ["cores=96", "machine=x86_64", "gpu=NVIDIA H100 80GB HBM3", "gpu=NVIDIA H100 80GB HBM3"]
    found = facts.HostHardware().process(lines)
    assert (found.nvidia_gpus, found.cpu_cores) == (2, 96)
    assert facts.HostHardware().process(["cores=2", "machine=aarch64"]) == Hardware(
        nvidia_gpus=0, cpu_cores=2, machine="aarch64"
    )


def test_only_worker_units_are_taken_for_workers() -> None:
    lines = ["gpu-worker@9005.service", "gpu-worker@x.service", "other.service"]
    assert facts.WorkerPorts().process(lines) == [9005]


def test_a_socket_alone_is_a_worker_too_and_counts_once() -> None:
    lines = ["gpu-worker@9007.socket", "gpu-worker@9005.socket", "gpu-worker@9005.service"]
    assert facts.WorkerPorts().process(lines) == [9005, 9007]


def test_a_certificate_says_until_when_for_whom_and_who_answers_for_it() -> None:
    found = facts.Certificate().process(
        [
            *("exists", "matches", "lasts", "ocsp", "unresolved=ocsp.example.com", "chain=2"),
            "notAfter=Feb 26 14:03:21 2027 GMT",
            "issuer=C = US, O = Let's Encrypt, CN = E7",
            "X509v3 Subject Alternative Name: ",
            "    DNS:gw.example.com, IP Address:10.0.0.11",
        ]
    )
    assert (found.exists, found.matches, found.lasts, found.ocsp) == (True, True, True, True)
    assert (found.chain, found.unresolved) == (2, "ocsp.example.com")
    assert found.ends == "Feb 26 14:03:21 2027 GMT"
    assert found.issuer == "C = US, O = Let's Encrypt, CN = E7"
    assert found.names == {"DNS:gw.example.com", "IP:10.0.0.11"}
    assert facts.Certificate().process(["chain="]).chain == 0
