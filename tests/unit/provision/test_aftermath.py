"""What a deploy tells of earlier configurations and of files of others."""

import pytest

from provision.aftermath import Seen, messages

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
