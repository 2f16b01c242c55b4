"""How far ``transformers`` is with a model's weights, by the hook of its progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.utils import logging

Report = Callable[[float], None]
_listener: ContextVar[Report | None] = ContextVar("_listener", default=None)


@contextmanager
def reported_to(report: Report) -> Iterator[None]:
    """Until the end ``report`` hears, after every weight that this thread loads, which part of them is, from 0 to 1.

    Of releases of ``transformers`` without the hook it hears nothing.
    """
    if set_hook := getattr(logging, "set_tqdm_hook", None):
        set_hook(_count)  # for good: without a listener it changes nothing
    token = _listener.set(report)
    try:
        yield
    finally:
        _listener.reset(token)


def _count(make_bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    report = _listener.get()
    if report is None or not args or not hasattr(args[0], "__len__"):
        return make_bar(*args, **kwargs)
    return _counted(make_bar(*args, **kwargs), len(args[0]), report)


def _counted(items: Iterable[object], total: int, report: Report) -> Iterator[object]:
    for number, item in enumerate(items, 1):
        yield item
        report(number / total)
