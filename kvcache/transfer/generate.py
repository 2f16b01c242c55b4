"""Writes the protobuf and gRPC stubs of every .proto in the packages, next to it: ``make proto``.

The stubs are checked in, so that running Twinpool needs no compiler; a test compares them with what this
module writes, byte for byte. They name the grpcio-tools that wrote them, which setup.py therefore pins.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PACKAGES = ("kvcache", "scheduler", "workers", "engine", "benchmarks")
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def find_in_packages(root: Path, *patterns: str) -> list[Path]:
    """Files of the packages under ``root`` whose name matches, sorted, as paths relative to ``root``."""
    return sorted(
        path.relative_to(root)
        for package in PACKAGES
        for pattern in patterns
        for path in (root / package).rglob(pattern)
    )


def generate(root: Path, out: Path) -> list[Path]:
    """Compiles every .proto in the packages under ``root`` into the same folder under ``out``, which must exist.

    Imports in the stubs are absolute (``from kvcache.transfer import kv_transfer_pb2``).

    Returns:
        The .proto files, relative to ``root``.

    Raises:
        FileNotFoundError: there is no .proto.
        ValueError: a .proto does not compile; protoc has said why on standard error.
    """
    protos = find_in_packages(root, "*.proto")
    if not protos:
        raise FileNotFoundError(f"no .proto file in {', '.join(PACKAGES)}")
    well_known_types = files("grpc_tools") / "_proto"
    flags = [
        f"-I{root}",
        f"-I{well_known_types}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main(["protoc", *flags, *map(str, protos)]) != 0:
        raise ValueError(f"protoc refused one of {', '.join(map(str, protos))}")
    return protos


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    protos = generate(root, root)
    sys.stdout.write("".join(f"{proto}: stubs written\n" for proto in protos))
    return 0


if __name__ == "__main__":
    sys.exit(main())
