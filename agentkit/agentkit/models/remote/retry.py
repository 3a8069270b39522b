"""Retries: the wait after a failed request, and a rate limiter that all requests with one key share."""

from __future__ import annotations

import hashlib
import random
from math import inf
from types import TracebackType
from typing import Final, Self

import anyio
from anyio.lowlevel import RunVar

BASE_S: Final = 0.5
MAX_WAIT_S: Final = 60.0


def wait_s(failures: int, retry_after_s: float | None) -> float | None:
    """Return the seconds to wait after this many failures in a row; None if the server asks for more than MAX_WAIT_S.

    If the server does not ask for a wait, this is exponential backoff with full jitter.
    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    if retry_after_s is None:
        return random.uniform(0, min(MAX_WAIT_S, BASE_S * 2 ** (failures - 1)))
    if retry_after_s > MAX_WAIT_S:
        return None
    return retry_after_s + random.uniform(0, min(1.0, retry_after_s / 10))


class RateLimiter:
    """Bounds the number of requests in flight, and pauses them when the API reports a rate limit.

    Use it as a context manager around each request. `throttle` lowers the bound to half of the requests in flight, or
    to the number that were not refused, if that is lower. Successful requests raise it again: by one for each round of
    requests, and ten times more slowly close to the number that was refused.
    """

    def __init__(self) -> None:
        self.max_connections = inf
        self.active = 0
        self._bound = self._refused_at = inf
        self._opens_at = -inf
        self._changed = anyio.Event()

    async def __aenter__(self) -> Self:
        while True:
            closed_s = self._opens_at - anyio.current_time()
            if closed_s > 0:
                await anyio.sleep(closed_s)
            elif self.active < min(self._bound, self.max_connections):
                self.active += 1
                return self
            else:
                await self._changed.wait()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.active -= 1
        if exc_type is None and self._bound < inf:
            self._bound += (1.0 if self._bound < self._refused_at - 1 else 0.1) / self._bound
        self._changed.set()
        self._changed = anyio.Event()

    def throttle(self, closed_s: float) -> None:
        """Start no request for `closed_s` seconds, and then fewer at a time."""
        now = anyio.current_time()
        if now >= self._opens_at:  # one burst of refusals counts once
            self._refused_at = self.active + 1
            self._bound = self._refused_at // 2
        self._bound = max(1.0, min(self._bound, self.active))  # at the end of the burst: the number not refused
        self._opens_at = max(self._opens_at, now + closed_s)


_LIMITERS: RunVar[dict[tuple[str, bytes], RateLimiter]] = RunVar("agentkit_rate_limiters")


def limiter_of(host: str, key: str | None, max_connections: int | None) -> RateLimiter:
    """Return the rate limiter that all sessions of this event loop share for a host and key."""
    limiters = _LIMITERS.get(None)
    if limiters is None:
        _LIMITERS.set(limiters := {})
    limiter = limiters.setdefault((host, hashlib.sha256((key or "").encode()).digest()), RateLimiter())
    if max_connections is not None:
        limiter.max_connections = max_connections
    return limiter
