"""The error tree is what its docstring draws, and every error can cross a process."""

from __future__ import annotations

import pickle
import re

import pytest

from kvcache import errors
from kvcache.errors import (
    ConfigError,
    InvariantError,
    ModelError,
    MovedError,
    OverloadedError,
    RateLimitError,
    RequestError,
    ResourceError,
    StartupError,
    TransferError,
    TransferFault,
    TwinpoolError,
    UnavailableError,
    UnknownModelError,
    WorkerLostError,
)

DRAWN_LINE = re.compile(r"^ {4}(?P<branch>(?:│ {3}| {4})*(?:[├└]── )?)(?P<name>\w+Error)\b")

SAMPLES = [
    TwinpoolError("text"),
    StartupError("text"),
    ConfigError("text"),
    ModelError("text"),
    ResourceError("text"),
    RequestError("text", "field"),
    RequestError("text"),
    UnknownModelError("text", "model"),
    OverloadedError("text", 2.5),
    RateLimitError("text", 1.5, "limit"),
    UnavailableError("text", 3.5),
    WorkerLostError("text", 4.5),
    MovedError("text", 5.5),
    *(TransferError(fault, "text") for fault in TransferFault),
    InvariantError("text"),
]


def drawn_tree() -> dict[str, str]:
    """Child → parent, as the module's docstring draws it."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = DRAWN_LINE.match(line)
        if match is None:
            continue
        depth = len(match["branch"]) // 4
        path[depth:] = [match["name"]]
        if depth:
            parents[match["name"]] = path[depth - 1]
    return parents


def error_classes() -> list[type[TwinpoolError]]:
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, TwinpoolError)]


def test_the_docstring_draws_the_real_tree() -> None:
    real = {each.__name__: each.__base__.__name__ for each in error_classes() if each is not TwinpoolError}
    assert drawn_tree() == real


def test_there_is_a_pickle_sample_of_every_error() -> None:
    assert {type(sample) for sample in SAMPLES} == set(error_classes())


@pytest.mark.parametrize("error", SAMPLES, ids=repr)
def test_an_error_survives_pickle_with_its_fields(error: TwinpoolError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.args, vars(copy), str(copy)) == (error.args, vars(error), str(error))


def test_a_request_error_names_its_field_outside_the_sentence() -> None:
    error = RequestError("max_tokens is 0.", "max_tokens")
    assert (str(error), error.param) == ("max_tokens is 0.", "max_tokens")


def test_a_transfer_error_begins_with_its_reason_code() -> None:
    assert str(TransferError(TransferFault.BAD_CHECKSUM, "layer 3")) == "bad_checksum: layer 3"
