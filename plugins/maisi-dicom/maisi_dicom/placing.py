"""Putting files and folders in place: all of them, complete, or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.files import refuse_overwriting

Write = Callable[[Path], None]


def place(things: Mapping[Path, Write], *, force: bool) -> None:
    """Write things of one folder under temporary names, then give them their own; a failure leaves all as it was.

    Each function writes one file or folder to the path that it is given. Raises `UsageError` when a thing exists and
    `force` is not set, or when a folder to be replaced holds more than a series; `CannotRun` when the disk is full or
    read-only.
    """
    for path in things:
        _refuse(path, force=force)
    folder = next(iter(things)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".dicom.", suffix=".part", dir=folder))
    except OSError as error:
        raise CannotRun(f"cannot write to {folder}: {error.strerror}", hint="choose another --out") from error
    try:
        for path, write in things.items():
            write(stage / path.name)
        _exchange(list(things), stage, force=force)
    except OSError as error:
        raise CannotRun(f"cannot write to {folder}: {error.strerror}", hint="free disk space or choose another --out") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _refuse(path: Path, *, force: bool) -> None:
    refuse_overwriting(path, force=force)
    strange = next((each for each in sorted(path.iterdir()) if each.suffix != ".dcm"), None) if path.is_dir() else None
    if strange is not None:
        raise UsageError(f"{path} is not replaced: it holds {strange.name}, which is no slice of a series", hint="move it away")


def _exchange(paths: list[Path], stage: Path, *, force: bool) -> None:
    """Rename what is new into place and what is old out of it; on any failure, the other way round."""
    undo: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            _refuse(path, force=force)  # again: it may have come while the new one was written
            if path.exists():
                undo.append((stage / f"old {path.name}", path))
                path.rename(stage / f"old {path.name}")
            undo.append((path, stage / path.name))
            (stage / path.name).rename(path)
    except BaseException:
        for here, there in reversed(undo):
            if here.exists() and not there.exists():
                here.rename(there)
        raise
