"""Who may import whom, and a few rules that can be read off the source. ARCHITECTURE.md says why.

Each check takes a path and a source text and returns sentences, so that it can be shown to fail.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("kvcache", "scheduler", "workers", "engine", "benchmarks")  # a folder imports from its left only
RAY_FILES = {"scheduler/ray_actor.py", "workers/ray_worker.py"} | {
    f"engine/{name}.py" for name in ("launch", "node_requests", "ray_session")
}
POLICY_BANNED = {"ray", "grpc", "torch", "asyncio", "time", "random", "threading", "socket"}
KVCACHE_POLICY = {f"kvcache/{name}.py" for name in ("errors", "spec", "block_pool", "prefix", "manager", "lease")}
CODE_LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal"}
CODE_LOADING_CALLS = {"torch.load", "torch.serialization.load"}
ASSERTING_CALL = re.compile(r"_*(assert|check_|check$|expect|verify)|(raises|warns|fail)$")

Check = Callable[[PurePosixPath, ast.Module], list[str]]


def dotted_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """``np.random.rand`` as ``numpy.random.rand``; empty for what is not a chain of names."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def import_source(node: ast.ImportFrom, path: PurePosixPath) -> str:
    """The module a ``from`` import names, made absolute."""
    if not node.level:
        return node.module or ""
    folder = path.parts[: len(path.parts) - node.level]
    return ".".join((*folder, node.module) if node.module else folder)


def import_aliases(path: PurePosixPath, tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of what it was imported as."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            source = import_source(node, path)
            aliases |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return aliases


def imported_modules(path: PurePosixPath, tree: ast.Module) -> set[str]:
    """Dotted names of all that a file imports, at any depth, ``importlib.import_module("literal")`` included."""
    aliases = import_aliases(path, tree)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{import_source(node, path)}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = dotted_name(node.func, aliases)
            argument = node.args[0]
            if called in {"__import__", "importlib.import_module"} and isinstance(argument, ast.Constant):
                names.add(str(argument.value))
    return names


def top(module: str) -> str:
    return module.split(".", 1)[0]


def is_policy(path: PurePosixPath) -> bool:
    in_scheduler = path.parts[0] == "scheduler" and str(path) not in RAY_FILES
    return in_scheduler or str(path) in KVCACHE_POLICY


def against_direction(path: PurePosixPath, tree: ast.Module) -> list[str]:
    allowed = ORDER[: ORDER.index(path.parts[0]) + 1]
    roots = {top(module) for module in imported_modules(path, tree)} & {*ORDER, "tests"}
    return [f"{path} imports {root}" for root in sorted(roots.difference(allowed))]


def impure_policy(path: PurePosixPath, tree: ast.Module) -> list[str]:
    if not is_policy(path):
        return []
    roots = {top(module) for module in imported_modules(path, tree)} & POLICY_BANNED
    return [f"{path} is policy and imports {root}" for root in sorted(roots)]


def ray_out_of_place(path: PurePosixPath, tree: ast.Module) -> list[str]:
    uses_ray = "ray" in {top(module) for module in imported_modules(path, tree)}
    return [f"{path} imports ray"] if uses_ray and str(path) not in RAY_FILES else []


def code_loading(path: PurePosixPath, tree: ast.Module) -> list[str]:
    """Formats that run code when read."""
    aliases = import_aliases(path, tree)
    modules = {part for module in imported_modules(path, tree) for part in module.split(".")} & CODE_LOADERS
    uses = {dotted_name(node, aliases) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    return [f"{path} uses {name}" for name in sorted(modules | (uses & CODE_LOADING_CALLS))]


def iter_tests(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield node


def asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    return isinstance(node, ast.Call) and bool(ASSERTING_CALL.match(dotted_name(node.func, {}).rpartition(".")[2]))


def empty_tests(path: PurePosixPath, tree: ast.Module) -> list[str]:
    functions = list(iter_tests(tree))
    if not functions:
        return [f"{path} holds no test"]
    return [f"{path}: {each.name} asserts nothing" for each in functions if not any(map(asserts, ast.walk(each)))]


def package_files() -> list[Path]:
    return sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))


def report(check: Check, paths: list[Path]) -> list[str]:
    assert paths, "no files were found, so the check would prove nothing"
    return [
        line
        for path in paths
        for line in check(PurePosixPath(path.relative_to(ROOT).as_posix()), ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("check", [against_direction, impure_policy, ray_out_of_place, code_loading])
def test_packages_follow_the_import_rules(check: Check) -> None:
    assert report(check, package_files()) == []


def test_every_test_asserts_something() -> None:
    assert report(empty_tests, sorted((ROOT / "tests").rglob("test_*.py"))) == []


BAD = [
    (against_direction, "kvcache/manager.py", "from scheduler.types import Phase"),
    (against_direction, "scheduler/sim/clock.py", "import workers.probe"),
    (against_direction, "workers/service.py", "def f():\n    from engine import config"),
    (against_direction, "engine/cli.py", "from benchmarks import load"),
    (against_direction, "benchmarks/load.py", "from tests.fakes import FakeWorker"),
    (against_direction, "kvcache/transfer/wire.py", "from ...scheduler import types"),
    (against_direction, "kvcache/spec.py", "import importlib\nimportlib.import_module('engine.config')"),
    *((impure_policy, "scheduler/queue.py", f"import {name}") for name in sorted(POLICY_BANNED)),
    (impure_policy, "scheduler/sim/clock.py", "from time import monotonic"),
    (impure_policy, "scheduler/batching.py", "import torch.nn as nn"),
    *((impure_policy, path, "import threading") for path in sorted(KVCACHE_POLICY)),
    (ray_out_of_place, "engine/gateway.py", "import ray"),
    (ray_out_of_place, "workers/service.py", "from ray.util import state"),
    (ray_out_of_place, "kvcache/storage.py", "__import__('ray')"),
    *((code_loading, "kvcache/transfer/wire.py", f"import {name}") for name in sorted(CODE_LOADERS)),
    (code_loading, "workers/service.py", "from ray import cloudpickle"),
    (code_loading, "workers/model/loader.py", "import torch\ntorch.load('x')"),
    (code_loading, "workers/model/loader.py", "import torch as t\nread = t.load"),
    (code_loading, "workers/model/loader.py", "from torch import load\nload('x')"),
    (empty_tests, "tests/unit/test_a.py", "def test_a():\n    run()"),
    (empty_tests, "tests/unit/test_a.py", "class TestA:\n    async def test_a(self):\n        checkpoint('x')"),
    (empty_tests, "tests/unit/test_a.py", "def helper():\n    assert True"),
]

GOOD = [
    (against_direction, "engine/gateway.py", "from kvcache import errors\nimport scheduler.types, workers"),
    (against_direction, "kvcache/transfer/wire.py", "from ..spec import KVCacheSpec\nimport zlib"),
    (impure_policy, "scheduler/ray_actor.py", "import asyncio, ray, time"),
    (impure_policy, "kvcache/storage.py", "import torch"),
    (impure_policy, "scheduler/queue.py", "from scheduler.request import time"),
    *((ray_out_of_place, path, "import ray") for path in sorted(RAY_FILES)),
    (code_loading, "workers/model/loader.py", "from safetensors.torch import load_file\nimport json\njson.load(f)"),
    (empty_tests, "tests/unit/test_a.py", "def test_a():\n    assert run()"),
    (empty_tests, "tests/unit/test_a.py", "def test_a():\n    with pytest.raises(ValueError):\n        run()"),
    (empty_tests, "tests/unit/test_a.py", "def test_a(pool):\n    pool.check_integrity()"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_check_reports_bad_source(check: Check, path: str, source: str) -> None:
    assert check(PurePosixPath(path), ast.parse(source))


@pytest.mark.parametrize(("check", "path", "source"), GOOD)
def test_check_accepts_good_source(check: Check, path: str, source: str) -> None:
    assert check(PurePosixPath(path), ast.parse(source)) == []
