"""The model hub: what it says about a file, and fetching one so that it can go on later; nothing else opens a socket.

The endpoint is that of `HF_ENDPOINT`, the token that of `HF_TOKEN` (or of `hf auth login`), and proxies are the
environment's. Files come over plain HTTP from the resolve address, which every mirror serves, straight to where they
belong: there is no second copy in a cache. No telemetry is sent.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import __version__
from .catalog import WeightFile
from .errors import CannotRun
from .events import Note, OnEvent, Step, ignore

PUBLIC = "https://huggingface.co"
_MIB = 2**20
_TRUE = ("1", "on", "yes", "true")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_AGENT = f"maisi/{__version__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A file on the hub: its size, the etag (sha256 of large files, git's SHA-1 of small ones) and the commit."""

    url: str
    repo: str
    path: str
    bytes: int | None
    etag: str | None
    commit: str | None


def endpoint() -> str:
    """Return the address of the hub: `HF_ENDPOINT`, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def page(repo: str) -> str:
    """Return the address where a repository is shown, and its terms are accepted."""
    return f"{endpoint()}/{repo}"


def offline() -> bool:
    """Say whether the environment forbids the network (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").casefold() in _TRUE


def probe(weight: WeightFile) -> Remote:
    """Ask the hub about a file, at its pinned revision. Raises `CannotRun` that says what to do about a refusal."""
    library = _library()
    assert weight.repo is not None
    url = library.hf_hub_url(weight.repo, weight.path, revision=weight.revision or "main", endpoint=endpoint())
    asked = Remote(url=url, repo=weight.repo, path=weight.path, bytes=None, etag=None, commit=None)
    try:
        found = library.get_hf_file_metadata(url, token=library.get_token() or False, headers={"user-agent": _AGENT}, endpoint=endpoint())
    except Exception as error:
        raise _explained(error, asked) from error
    if found.commit_hash is None and found.etag is None:
        raise _no_hub()
    return Remote(url=url, repo=weight.repo, path=weight.path, bytes=found.size, etag=found.etag, commit=found.commit_hash)


def fetch(remote: Remote, target: Path, on_event: OnEvent = ignore) -> Path:
    """Fetch a file to a hidden partial file beside `target`, going on where an earlier fetch stopped; return its path.

    The caller checks it and moves it into place. A fetch that fails leaves what has arrived for the next one. Raises
    `CannotRun` for a hub that cannot be reached or refuses, and for a full disk.
    """
    version = re.sub(r"\W", "", remote.etag or remote.commit or "")[:16]  # a server's words must not make a path
    part = target.with_name(f".{target.name}.{version or 'unknown'}.part")
    for stale in parts(target):
        if stale != part:
            stale.unlink()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if remote.bytes is None or have > remote.bytes:
            part.unlink(missing_ok=True)
            have = 0
        with part.open("ab") as file:
            _stream(remote, _Counted(file, remote, have, on_event), have)
    except KeyboardInterrupt:
        on_event(Note(text=f"what has arrived of {remote.path} stays: the next try goes on from there"))
        raise
    except Exception as error:
        arrived = part.stat().st_size if part.exists() else 0
        if not arrived:
            part.unlink(missing_ok=True)
        raise _explained(error, remote, arrived) from error
    return part


def parts(target: Path) -> list[Path]:
    """Return the partial files of `target`."""
    return sorted(target.parent.glob(f".{target.name}.*.part")) if target.parent.is_dir() else []


def _stream(remote: Remote, file: Any, have: int) -> None:
    library = _library()
    from huggingface_hub.file_download import http_get

    headers = {"user-agent": _AGENT, "accept-encoding": "identity"}  # compressed bytes could not be counted or resumed
    if token := library.get_token():
        headers["authorization"] = f"Bearer {token}"  # not sent on to another host when the hub redirects
    http_get(remote.url, file, resume_size=have, headers=headers, expected_size=remote.bytes)


class _Counted:
    """An open file that tells how much of the whole has arrived."""

    def __init__(self, file: IO[bytes], remote: Remote, have: int, on_event: OnEvent) -> None:
        self._file, self._remote, self._on_event = file, remote, on_event
        self._done = have

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def truncate(self, size: int | None = None) -> int:
        self._done = self._file.truncate(size)
        return self._done

    def write(self, chunk: bytes) -> int:
        self._done += len(chunk)
        if self._remote.bytes:
            total = -(-self._remote.bytes // _MIB)
            self._on_event(Step(stage="fetch", done=min(-(-self._done // _MIB), total), total=total))
        return self._file.write(chunk)


def _library() -> Any:
    """Import the hub's library so that it sends no telemetry and draws no bars."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging

    constants.HF_HUB_DISABLE_TELEMETRY = True  # also where something else imported the library before
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    logging.set_verbosity_error()  # what goes wrong is said by the errors here
    return huggingface_hub


def _explained(error: Exception, remote: Remote, arrived: int = 0) -> CannotRun:
    """Return the error that says what went wrong with a file and what to do about it."""
    what = f"{remote.path} of {remote.repo}"
    again = f"run it again: it goes on after the {arrived / _MIB:.3g} MiB that have arrived" if arrived else "try again later"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        token = "the token of HF_TOKEN is not enough" if _has_token() else "no token is set"
        return CannotRun(f"the hub refuses {what} ({status}): {token}",
                         hint=f"accept the terms at {page(remote.repo)}, then set HF_TOKEN to a token of that account")  # fmt: skip
    if status == 404:
        return CannotRun(f"the hub has no {what} at that revision (404)",
                         hint=f"look at {page(remote.repo)}, and check HF_ENDPOINT where it is set")  # fmt: skip
    if status is not None:
        return CannotRun(f"the hub answers {status} for {what}", hint=again)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return CannotRun(f"{what} is not here, and HF_HUB_OFFLINE forbids to fetch it",
                         hint="unset HF_HUB_OFFLINE, or use  maisi models import BUNDLE")  # fmt: skip
    if type(error).__name__ == "FileMetadataError":
        return _no_hub()
    if isinstance(error, OSError) and error.errno in _DISK:
        return CannotRun(f"cannot write {what}: {error.strerror}", hint="free disk space, or set MAISI_HOME to another disk")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return CannotRun(f"{what} arrived incomplete", hint=again)
    reason = " ".join(str(error).split()) or type(error).__name__
    hint = again if arrived else "check the network and HTTPS_PROXY, or use  maisi models import BUNDLE"
    return CannotRun(f"cannot reach {endpoint()} for {what}: {reason}", hint=hint)


def _no_hub() -> CannotRun:
    return CannotRun(f"{endpoint()} does not answer as a model hub does", hint="check HF_ENDPOINT and the proxy")


def _has_token() -> bool:
    return bool(_library().get_token())
