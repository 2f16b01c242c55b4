"""The native builds: all are there where they can be built, and nothing fails where they cannot."""

from __future__ import annotations

import ast
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from workers.native import library

ROOT = Path(__file__).parents[3]
# As setuptools looks for it.
COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
CAN_BUILD = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which(COMPILER) is not None


def value_in_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    ]
    return ast.literal_eval(value)


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler for x86-64 Linux here")
@pytest.mark.parametrize("name", [name for name, _ in library.BUILDS])
def test_every_build_is_there_and_of_this_source_where_there_is_a_compiler(name: str) -> None:
    """setup.py passes over one that does not compile, and the tests of the native decoder over one that is missing."""
    path = library.path_of(name)
    assert path is not None, f"{name} was not built though {COMPILER} is here; see what setup.py build_ext prints"
    assert library._declare(path) is not None


def test_setup_builds_what_is_looked_for_and_knows_all_that_it_is_made_of() -> None:
    assert set(value_in_setup("NATIVE_BUILDS")) == {name for name, _ in library.BUILDS}
    headers = {path.stem for path in (ROOT / "workers" / "native").glob("*.h")}
    assert set(value_in_setup("NATIVE_HEADERS")) == headers  # one that is not named is changed without a new build


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no-such-compiler") >= len(library.BUILDS)  # it was asked for each
    assert not list(tmp_path.rglob("*.so"))
