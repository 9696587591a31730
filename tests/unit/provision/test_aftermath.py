"""What a deploy tells of earlier configurations and of files of others."""

import subprocess
from pathlib import Path

import pytest

from provision.aftermath import Seen, messages
from provision.facts import LEFTOVERS
from provision.nginx_packages import NO_WELCOME

MANAGED = ("/etc/systemd/system/nginx.service.d/gateway.conf",)


@pytest.mark.parametrize(
    ("lines", "timeout_s", "told"),
    [
        ([], 0, []),
        ([f"file {MANAGED[0]}"], 60, []),
        (
            ["process 3"],
            0,
            [
                "nginx: 1 process of earlier configurations with 3 sockets of clients; they stay "
                "until they close (worker_shutdown_timeout_s = 0 cuts none)"
            ],
        ),
        (
            ["process 3", "process 0", "file /etc/nginx/conf.d/a b.conf"],
            60,
            [
                "nginx: 2 processes of earlier configurations with 3 sockets of clients; they are "
                "cut 60 s after their reload (by processes that were started under this "
                "worker_shutdown_timeout_s)",
                "read by nginx, not managed here, left alone: /etc/nginx/conf.d/a b.conf",
            ],
        ),
    ],
)
def test_what_is_left_and_what_is_foreign_is_told(
    lines: list[str], timeout_s: int, told: list[str]
) -> None:
    assert messages(Seen.of(lines), managed=MANAGED, shutdown_timeout_s=timeout_s) == told


def test_a_file_that_the_deploy_emptied_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "default.conf").write_text(f"{NO_WELCOME}\n")
    (tmp_path / "more.conf").write_text(f"{NO_WELCOME}\nserver {{ listen 81; }}\n")
    stand_ins = "ss() { :; }; pgrep() { :; }\n"
    looked = subprocess.run(
        ["sh", "-c", stand_ins + LEFTOVERS, "sh", "( sport = :8009 )", NO_WELCOME, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert looked.stdout.splitlines() == [f"file {tmp_path}/more.conf"]
