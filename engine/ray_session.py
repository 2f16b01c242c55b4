"""A Ray cluster of our own on this machine, or one that is joined, and the signals that end it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import ray
from ray.exceptions import RayError

from engine.process_tree import adopt_orphans, end_children
from kvcache.errors import ResourceError
from scheduler.room import Node

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no token and no KV goes through it
CONNECT_TIMEOUT_S = 5.0
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """Whatever ends this process early goes through the clean-up below."""
    for signum in END_SIGNALS:
        signal.signal(signum, _interrupt)


_interrupted = threading.Event()


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """An exception raised inside a library's callback may be lost there; the flag is not."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def ray_session(num_processes: int) -> Iterator[None]:
    """A Ray cluster of our own on this machine, with a token, in a folder that goes away with it.

    ``num_processes`` are started with it, to become actors at once when they are asked for.
    """
    # Short: the paths of Ray's sockets below it may not exceed 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="twinpool-"))
    adopt_orphans()
    try:
        try:
            ray.init(
                address="local",
                namespace="twinpool",
                num_cpus=num_processes,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
        except Exception as error:  # also bare ones: of a node that is not up in time, for one
            raise ResourceError(f"Ray could not start: {error}") from error
        check_interrupted()
        yield
    finally:
        ray.shutdown()
        end_children()  # agents of a session that ended while it began
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """A running Ray cluster, which goes on after us: our actors have a namespace of their own, and end with us.

    Raises:
        ResourceError: there is none at ``address``, or it does not let us in.
    """
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            namespace=f"twinpool-{uuid.uuid4().hex[:12]}",  # a second server in the same cluster does not meet us
            logging_level=logging.WARNING,
        )
    except (RayError, OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ResourceError(f"The Ray cluster at --address {address} cannot be joined: {reason}") from error
    try:
        check_interrupted()
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"No Ray cluster can be reached at --address {address}: {error}.") from None


def cluster_nodes() -> list[Node]:
    """All live nodes of the cluster, with what they have in all."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]), dict(node.get("Labels") or {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
