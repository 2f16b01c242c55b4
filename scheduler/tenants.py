"""What each tenant may ask for: token buckets and a count, as functions of the time they are told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvcache.errors import RateLimitError, RequestError
from scheduler.urgency import ServiceClass

DEFAULT_TENANT = "default"
_MINUTE_S = 60.0
RUNNING_RETRY_S = 1.0  # nobody knows when one of the tenant's requests will end


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays for a request. A limit of None is no limit."""

    name: str  # what metrics and logs show
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    running_requests: int | None = None  # at once; one with several choices is one
    weight: float = 1.0  # its share beside other tenants of the same class
    highest_class: ServiceClass = ServiceClass.INTERACTIVE  # BATCH: all its requests are batch work


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of one limit per minute."""

    of: str  # "requests" or "tokens"
    per_minute: int
    remaining: int
    full_in_s: float  # until all of it is there again, if nothing more is asked for


@dataclass(slots=True)
class TokenBucket:
    """Fills up within a minute; whoever takes from it waits until there is enough."""

    per_minute: int
    _level: float = field(init=False)
    _filled_at_s: float | None = None

    def __post_init__(self) -> None:
        self._level = self.per_minute

    def missing_s(self, amount: float, now: float) -> float:
        """Seconds until that much will be there; 0 when it is."""
        self._fill(now)
        return max(0.0, amount - self._level) * _MINUTE_S / self.per_minute

    def level(self, now: float) -> float:
        self._fill(now)
        return self._level

    def take(self, amount: float) -> None:
        """After ``missing_s`` said 0, or to give back what was not used, with an amount below 0."""
        self._level = min(self.per_minute, self._level - amount)

    def _fill(self, now: float) -> None:
        if self._filled_at_s is not None:
            self._level = min(self.per_minute, self._level + (now - self._filled_at_s) * self.per_minute / _MINUTE_S)
        self._filled_at_s = now


class TenantGate:
    """Counts the requests of one tenant and refuses what is over its limits.

    A request takes from the tokens what it may come to, prompt and longest answer, and gives back at its end what
    it did not come to. So no number of requests at once gets past the limit.
    """

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.num_running = 0
        self._requests = _bucket(tenant.requests_per_minute)
        self._tokens = _bucket(tenant.tokens_per_minute)

    def count_running(self) -> int:
        return self.num_running

    def enter(self, num_tokens: int, now: float) -> None:
        """A request begins. All limits are looked at before any is charged.

        Raises:
            RateLimitError: names the limit that it would break, and says when to try again.
            RequestError: it may come to more tokens than the tenant has in a minute.
        """
        if self._tokens is not None and num_tokens > self._tokens.per_minute:
            raise RequestError(
                f"The request may come to {num_tokens} tokens; tenant {self.tenant.name!r} has"
                f" {self._tokens.per_minute} per minute.",
                "max_tokens",
            )
        limit = self.tenant.running_requests
        if limit is not None and self.num_running >= limit:
            raise self._over("running_requests", limit, RUNNING_RETRY_S)
        for name, bucket, amount in (
            ("requests_per_minute", self._requests, 1),
            ("tokens_per_minute", self._tokens, num_tokens),
        ):
            missing_s = bucket.missing_s(amount, now) if bucket is not None else 0.0
            if bucket is not None and missing_s > 0:
                raise self._over(name, bucket.per_minute, missing_s)
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(num_tokens)
        self.num_running += 1

    def allowances(self, now: float) -> list[Allowance]:
        """Of the limits that there are."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return [
            Allowance(name, bucket.per_minute, math.floor(bucket.level(now)), bucket.missing_s(bucket.per_minute, now))
            for name, bucket in buckets.items()
            if bucket is not None
        ]

    def leave(self, num_unused_tokens: int) -> None:
        """It has ended, with so many tokens less than it might have come to."""
        self.num_running -= 1
        if self._tokens is not None:
            self._tokens.take(-num_unused_tokens)

    def _over(self, name: str, limit: int, retry_after_s: float) -> RateLimitError:
        message = f"Tenant {self.tenant.name!r} is over its limit {name} of {limit}."
        return RateLimitError(message, retry_after_s, name)


def _bucket(per_minute: int | None) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute)
