"""The default model and its reference are made once for all end-to-end tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.reference import ReferenceCase, make_reference
from workers.model.checkpoint import DEFAULT_MODEL, prepare_checkpoint


@pytest.fixture(scope="package", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what servers leave behind: another one on this machine has folders of the same names in the common one."""
    tmp_path_factory.getbasetemp()  # chosen now: it outlives this folder
    folder = tempfile.mkdtemp(prefix="t")  # short: Ray puts sockets in it
    before, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), folder
    tempfile.tempdir = None  # asked for again
    yield
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    tempfile.tempdir = None
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return prepare_checkpoint(DEFAULT_MODEL, show_progress=False)


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> list[ReferenceCase]:
    return make_reference(checkpoint)
