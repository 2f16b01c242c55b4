"""Every error that Twinpool raises on purpose.

::

    TwinpoolError                       catch this for "anything Twinpool told us"
    ├── StartupError                    `twinpool serve` ends with this sentence and a non-zero exit
    │   ├── ConfigError                 a flag, an environment variable or a YAML key
    │   ├── ModelError                  a checkpoint that is missing, damaged or cannot run
    │   └── ResourceError               memory, a port, a broken installation
    ├── RequestError                    the client's fault: HTTP 400, names the field
    │   └── UnknownModelError           HTTP 404
    ├── OverloadedError                 back-pressure: HTTP 503 with Retry-After
    │   ├── RateLimitError              a tenant's limit or a target: HTTP 429 with Retry-After
    │   └── UnavailableError            no worker for a phase, or a handoff failed
    │       ├── WorkerLostError         the connection to the worker at work broke
    │       └── MovedError              the worker drains, and the sequence is to go on elsewhere
    ├── TransferError                   a KV handoff was refused or broken; carries a reason code
    └── InvariantError                  our own bookkeeping is wrong: a bug, never bad input

All of them take positional arguments only and survive a pickle round trip, because Ray pickles
exceptions between processes.
"""

from __future__ import annotations

from enum import StrEnum


class TwinpoolError(Exception):
    """Root of the tree."""


class StartupError(TwinpoolError):
    """Nothing was started; the message is one sentence for the operator."""


class ConfigError(StartupError):
    """A flag, an environment variable or a YAML key is wrong."""


class ModelError(StartupError):
    """A checkpoint is missing, damaged, or of an architecture that cannot run."""


class ResourceError(StartupError):
    """The machine does not have what the configuration needs."""


class RequestError(TwinpoolError):
    """A request that can never succeed as it stands. ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


class OverloadedError(TwinpoolError):
    """Not now: queues are full. Try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class RateLimitError(OverloadedError):
    """This request is one too many. ``limit`` names what it would exceed, a tenant's limit or a target."""

    def __init__(self, message: str, retry_after_s: float, limit: str) -> None:
        super().__init__(message, retry_after_s)
        self.args = (message, retry_after_s, limit)
        self.limit = limit


class UnavailableError(OverloadedError):
    """No live worker can do a phase of this request, or its handoff failed. It may work elsewhere or later."""


class WorkerLostError(UnavailableError):
    """The connection to the worker that was called broke; what it did is unknown."""


class MovedError(UnavailableError):
    """The worker drains and has ended the sequence: it goes on elsewhere, after the tokens that came before this."""


class TransferFault(StrEnum):
    """Why a KV handoff was refused or broken. The value is the metric label."""

    UNKNOWN_TRANSFER = "unknown_transfer"
    STALE_EPOCH = "stale_epoch"
    BAD_CHECKSUM = "bad_checksum"
    BAD_LENGTH = "bad_length"
    OUT_OF_BOUNDS = "out_of_bounds"
    REPEATED = "repeated"
    OUT_OF_ORDER = "out_of_order"
    INCOMPLETE = "incomplete"
    EXPIRED = "expired"
    ABORTED = "aborted"
    INCOMPATIBLE = "incompatible"
    PEER_LOST = "peer_lost"
    MALFORMED = "malformed"

    @property
    def is_accident(self) -> bool:
        """It can befall a sender that keeps to the protocol: what it sent before holds good."""
        accidents = (self.BAD_CHECKSUM, self.EXPIRED, self.ABORTED, self.PEER_LOST)
        return self in accidents


class TransferError(TwinpoolError):
    """A KV handoff was refused or broken; the blocks of both sides have been or will be given back."""

    def __init__(self, fault: TransferFault, message: str) -> None:
        super().__init__(fault, message)
        self.fault = fault
        self.message = message

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.message}"


class InvariantError(TwinpoolError):
    """Twinpool's own bookkeeping contradicts itself. Always a bug."""
