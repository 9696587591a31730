"""Which worker may be restarted when: what a rolling restart knows across the hosts of a run.

Pure but for the clock that is handed in. The restarts themselves are `operations.roll_workers`.

nginx leaves a worker that refused a connection out for `upstream_fail_timeout_s`, also when it is
ready again before. If the next one went down meanwhile, nobody would be left in nginx's eyes: so a
worker counts as seen again when every gateway was answered by it, or that time is over.
"""

from __future__ import annotations

from collections.abc import Mapping

# nginx counts whole seconds, and leaves a worker out until more than `fail_timeout` have passed.
_NGINX_ROUNDS_S = 1.5


class Rollout:
    """One run is one process, and its hosts share this. Workers are named HOST:PORT."""

    def __init__(self) -> None:
        self._under_way: list[str] = []
        self._up: dict[str, int] = {}
        self._unseen: dict[str, float] = {}

    def note(
        self, worker: str, *, weight: int, up_s: float | None = None, now: float = 0.0
    ) -> None:
        """What was found: it is up with this share of the capacity; 0 is down, or a backup.

        `up_s`: for how many seconds, where that is known. One that came up just now (a run that
        was cut may have restarted it) counts as not seen yet, as after `end`.
        """
        self._up[worker] = weight
        if up_s is not None:
            self._unseen.setdefault(worker, now - up_s)

    def lose(self, worker: str) -> None:
        """Its host failed in this run: if nobody looked at it before, it counts as down."""
        self._up.setdefault(worker, 0)

    @property
    def failed_on(self) -> str | None:
        """The first restart that was begun and never came to its end: nobody else restarts."""
        return self._under_way[0] if self._under_way else None

    def begin(self, what: str) -> None:
        """It is taken down. What never comes to `end` has failed."""
        self._under_way.append(what)

    def end(self, what: str, weights: Mapping[str, int], *, now: float) -> None:
        """Its workers are ready again, with these weights; the gateways may not know yet."""
        self._under_way.remove(what)
        self._up |= weights
        self._unseen |= dict.fromkeys(weights, now)

    def unseen(self, *, fail_timeout_s: float, now: float) -> tuple[list[str], float]:
        """Workers that a gateway may still leave out, and for how many seconds at most."""
        ends = {name: at + fail_timeout_s + _NGINX_ROUNDS_S for name, at in self._unseen.items()}
        waiting = [name for name, end in ends.items() if end > now]
        return waiting, max((ends[name] - now for name in waiting), default=0.0)

    def all_seen(self) -> None:
        """Every gateway sends clients to all that are ready."""
        self._unseen.clear()

    def refusal(self, worker: str, *, min_up: float, capacity: Mapping[str, int]) -> str | None:
        """Why `worker` may not go down now; None: it may.

        `capacity`: the weights of all declared workers that serve the same. One that is down costs
        nothing; and where all are up, one may go, whatever share that is. One that nobody looked
        at, as its host is not part of the run (`--limit`), counts as up.
        """
        up = {name: self._up.get(name, weight) for name, weight in capacity.items()}
        down = [name for name, weight in capacity.items() if weight and not up[name]]
        if not down or not up.get(worker):
            return None
        left = (sum(up.values()) - up[worker]) / sum(capacity.values())
        if left >= min_up:
            return None
        return (
            f"without it {left:.0%} of the capacity would be up, and min_up is {min_up:.0%}; down "
            f"are {', '.join(down)}: bring them back first, or set min_up lower for this run"
        )
