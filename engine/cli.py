"""The `twinpool` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import cluster_commands
from engine import config as configuration
from engine.admin_key import ENVIRONMENT_VARIABLE as ADMIN_KEY_VARIABLE
from engine.admin_key import find_key
from engine.cluster_view import show_status
from engine.http_call import base_url
from engine.probe_view import ProbeOptions, show_probe
from engine.startup import prepare_ray
from kvcache.errors import ConfigError, StartupError, TwinpoolError
from scheduler.types import WorkerRole
from workers.model.checkpoint import DEFAULT_MODEL, prepare_checkpoint

DEFAULT_URL = "http://127.0.0.1:8000"


class _Parser(argparse.ArgumentParser):
    """Ends with one sentence on a bad flag, without the usage in front of it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"twinpool: {message}. See '{self.prog} --help'.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for a failure, 2 for a wrong command line, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except StartupError as error:
        print(f"twinpool: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except TwinpoolError as error:
        print(f"twinpool: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="twinpool",
        description="Serve a language model with prefill and decode on separate workers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"twinpool {metadata.version('twinpool')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start a cluster on this machine and serve the OpenAI API",
        description="Every option is also an environment variable (TWINPOOL_MAX_MODEL_LEN) and a YAML key"
        " (max_model_len). A flag wins, then the environment, then the file.",
        allow_abbrev=False,
    )
    configuration.add_arguments(serve)
    serve.set_defaults(run=_serve)

    fetch = commands.add_parser(
        "fetch", help="fetch and convert a model, so that serving needs no network", allow_abbrev=False
    )
    fetch.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, GGUF file, hub id, or the default model"
    )
    fetch.set_defaults(run=_fetch)

    status = commands.add_parser("status", help="show the workers of a running cluster", allow_abbrev=False)
    status.add_argument("--url", default=DEFAULT_URL, help="where it serves (default: %(default)s)")
    key = os.environ.get("TWINPOOL_API_KEY", "").split(",")[0].strip()
    status.add_argument("--api-key", default=key, help="key, when the server asks for one (or TWINPOOL_API_KEY)")
    status.add_argument("--json", action="store_true", help="print the raw answer")
    status.set_defaults(run=_status)
    _add_probe(commands)
    _add_operator_commands(commands)
    return parser


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe",
        help="measure what this device can do, as the scheduler sees it",
        description="Measures linear layers by rows, memory and decode attention, as a worker of the model computes"
        " them. What --json prints of one device is a file for --device-profile.",
        allow_abbrev=False,
    )
    probe.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="whose steps are timed (default: %(default)s)")
    probe.add_argument(
        "--device-profile",
        action="append",
        default=[],
        metavar="PROFILE",
        help="a file or a shipped name, shown beside this device; may be repeated",
    )
    probe.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    probe.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    probe.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)")
    probe.add_argument("--json", action="store_true", help="print JSON: of this device, or of all in a list")
    probe.add_argument("--output", type=Path, metavar="FILE", help="draw the rooflines: an .svg or .png file")
    probe.set_defaults(run=_probe)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads from 1 to 1024")
    return int(text)


def _add_operator_commands(commands: Any) -> None:
    """What changes a running cluster; all of it waits until it is so."""

    def add(name: str, help_text: str, run: Callable[[argparse.Namespace], None], *, names_worker: bool = True) -> Any:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if names_worker:
            command.add_argument("worker", help="its name, as in `twinpool status`")
        command.add_argument("--url", default=DEFAULT_URL, help="where it serves (default: %(default)s)")
        command.add_argument(
            "--admin-key",
            default=os.environ.get(ADMIN_KEY_VARIABLE),
            help=f"the server's admin key (or {ADMIN_KEY_VARIABLE}; found by itself for one of yours on this machine)",
        )
        command.add_argument(
            "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="to wait; 0: not (default: 600)"
        )
        command.set_defaults(run=run)
        return command

    drain = add("drain", "let a worker end what it does, and give it nothing new", _drain)
    drain.add_argument("--force", action="store_true", help="even if nobody else takes its phase")
    _add_move_after(drain)
    add("undrain", "give a drained worker requests again", _undrain)
    role = add("role", "drain a worker and give it the other role", _role)
    role.add_argument("role", choices=[WorkerRole.PREFILL.value, WorkerRole.DECODE.value])
    _add_move_after(role)
    scale = add("scale", "start workers, or drain and end them", _scale, names_worker=False)
    for pool in WorkerRole:
        scale.add_argument(f"--{pool.value}", type=_count, metavar="N", help=f"{pool.value} workers there shall be")


def _add_move_after(command: Any) -> None:
    command.add_argument(
        "--move-after",
        type=_seconds,
        metavar="SECONDS",
        help="what still decodes there after so long goes on at other workers (default: the server's --drain-timeout)",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("must be from 0 to 86400")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 256:
        raise argparse.ArgumentTypeError("must be from 0 to 256")
    return count


def _target(options: argparse.Namespace) -> cluster_commands.Target:
    url = base_url(options.url)
    return cluster_commands.Target(url, options.admin_key or find_key(url), options.timeout)


def _drain(options: argparse.Namespace) -> None:
    cluster_commands.drain(_target(options), options.worker, force=options.force, move_after_s=options.move_after)


def _undrain(options: argparse.Namespace) -> None:
    cluster_commands.undrain(_target(options), options.worker)


def _role(options: argparse.Namespace) -> None:
    cluster_commands.change_role(_target(options), options.worker, WorkerRole(options.role), options.move_after)


def _scale(options: argparse.Namespace) -> None:
    counts = {role: count for role in WorkerRole if (count := getattr(options, role.value)) is not None}
    if not counts:
        raise ConfigError("Say how many: twinpool scale --prefill N --decode M.")
    cluster_commands.scale(_target(options), counts)


def _serve(options: argparse.Namespace) -> None:
    flags = {name: value for name, value in vars(options).items() if name in configuration.ServeConfig.model_fields}
    settings = configuration.load_config(flags, options.config)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    prepare_ray(joins=settings.address is not None)  # before the import of ray, which reads the environment once
    from engine.launch import serve  # with torch, ray and transformers: seconds that other commands need not wait

    serve(settings)


def _fetch(options: argparse.Namespace) -> None:
    print(prepare_checkpoint(options.model))


def _probe(options: argparse.Namespace) -> None:
    show_probe(
        ProbeOptions(
            model=options.model,
            profiles=tuple(options.device_profile),
            dtype=options.dtype,
            quantization=options.quantization,
            threads=options.threads,
            as_json=options.json,
            output=options.output,
        )
    )


def _status(options: argparse.Namespace) -> None:
    show_status(options.url, options.api_key, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
