"""What pyinfra's dry run says, read as drift."""

from provision import drift


def operation(name: str, *, sure: list[str], maybe: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "hosts_with_change": sure,
        "hosts_with_conditional_change": maybe,
    }


def test_every_pending_operation_is_told_by_host() -> None:
    report = {
        "plan": [
            operation("nginx", sure=["gw2", "gw1"], maybe=[]),
            operation("reload", sure=[], maybe=["gw1"]),
            operation("idle", sure=[], maybe=[]),
        ]
    }
    assert drift.by_host(report) == {"gw1": ["nginx", "reload"], "gw2": ["nginx"]}
    assert drift.by_host({"plan": []}) == {}


def test_only_lines_of_files_are_taken_from_the_log() -> None:
    log = "--> Starting\n    [gw1]  | --- a (on the host)\n    [gw1]  | +user x;\n    [gw1]  Ready"
    assert drift._differences(log) == ["gw1 | --- a (on the host)", "gw1 | +user x;"]
