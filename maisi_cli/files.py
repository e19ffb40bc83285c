"""Writing files so that they are complete or absent, and never over a file of the user's."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from .errors import CannotRun, UsageError

if TYPE_CHECKING:
    from .settings import GenerateSettings

NIFTI_ENDS = (".nii.gz", ".nii")
LOCK = ".lock"
Save = TypeVar("Save", bound=Callable[..., Any])


def writes(names: Callable[[str, GenerateSettings], Iterable[str]]) -> Callable[[Save], Save]:
    """Say of an output format's function what it writes: `names(id, settings)` are files or folders in the output folder.

    What exists of them is refused before a run begins. So are samples that the format cannot hold (mode, modality): for
    these `names` raises `UsageError`.
    """

    def mark(save: Save) -> Save:
        save.names = names  # type: ignore[attr-defined]
        return save

    return mark


def stem(path: Path) -> str:
    """Return the name of a NIfTI file without its ending."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def refuse_overwriting(path: Path, *, force: bool) -> None:
    """Raise `UsageError` when `path` exists and `force` is not set."""
    if path.exists() and not force:
        raise UsageError(f"{path} already exists", hint="add --force to replace it, or choose another --out")


def require_folder(path: Path) -> None:
    """Refuse, before any work is done, a folder that cannot be made or written to.

    Raises `UsageError` when a file stands in its place, `CannotRun` when it may not be written to.
    """
    standing = next((each for each in (path, *path.absolute().parents) if each.exists()), None)
    if standing is not None and not standing.is_dir():
        raise UsageError(f"cannot write to {path}: {standing} is a file", hint="choose another --out")
    if standing is not None and not os.access(standing, os.W_OK | os.X_OK):
        raise CannotRun(f"cannot write to {path}: {standing} is not writable", hint="choose another --out")


@contextlib.contextmanager
def hold(folder: Path, *, busy: str, elsewhere: str = "choose another --out") -> Iterator[None]:
    """Hold a folder, made if need be, so that two processes never write to it at once; a folder that was made and stays empty is removed.

    A process lets go when it ends, however it ends. Raises `CannotRun` saying `busy` where another holds the folder, and with the
    hint `elsewhere` where it cannot be written to.
    """
    from filelock import FileLock, Timeout

    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CannotRun(busy, hint="wait until it is done") from error
    except OSError as error:
        raise CannotRun(f"cannot write to {folder}: {error.strerror}", hint=elsewhere) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if made and folder.is_dir() and not any(folder.iterdir()):
            for each in made:
                each.rmdir()


def write_atomic(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file so that it appears complete or not at all, whatever interrupts it.

    `content` is the bytes, or a function that writes them to an open file. Missing folders are made. Raises
    `CannotRun` for a disk that is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise CannotRun(f"cannot write to {path.parent}: {error.strerror}", hint="choose another --out") from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CannotRun(f"cannot write {path}: {error.strerror}", hint="free disk space or choose another --out") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
