"""What is installed: where each file came from, under which licence, whether it is still whole; bundles; removal.

Beside each file of the hub lies `FILE.origin.json` with its sha256 and that of the file it was made from. A released
`.pt` is on disk only until it is converted; the mask database stays the zip that it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from . import __version__
from .catalog import HUB_NAME, Licence, ModelSpec, WeightFile, extractors, home, models, pull_command
from .errors import CannotRun, Rejected, UsageError
from .events import Note, OnEvent, Stage, Step, ignore
from .files import hold, refuse_overwriting, write_atomic
from .hub import parts
from .record import sha256_of

ORIGIN_SCHEMA, BUNDLE_SCHEMA = "maisi.weight/1", "maisi.bundle/1"
_BLOCK, _MIB, _MANIFEST_MAX = 2**20, 2**20, 2**24
_BUNDLED_KINDS = (".safetensors", ".json", ".zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an installed file came from; `sha256` and `bytes` are its own, `source_*` those of the published file.

    `pinned` says whether the source was compared with a hash in the model's file, and not only with the hub's.
    """

    sha256: str
    bytes: int
    repo: str
    revision: str
    path: str
    layout: str
    source_sha256: str
    source_git_sha1: str
    source_bytes: int
    pinned: bool
    licence: str
    licence_url: str
    commercial: bool
    maisi: str = __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A file of a model, and whether it was there already (`present`) or was put there now (`fetched`)."""

    part: str
    file: Path
    status: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a bundle holds: the names of its models and the files it put in place, or found there already."""

    models: tuple[str, ...]
    files: tuple[Path, ...]
    present: tuple[Path, ...]
    bytes: int


# --- origins ------------------------------------------------------------------------------------


def origin_path(file: Path) -> Path:
    """Return where the origin of a file is written."""
    return file.with_name(f"{file.name}.origin.json")


def read_origin(file: Path) -> Origin | None:
    """Return the origin of a file; None when it is not known, or its note is damaged."""
    try:
        return _origin(json.loads(origin_path(file).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def write_origin(file: Path, origin: Origin) -> None:
    """Write the origin of a file beside it."""
    text = json.dumps({"schema": ORIGIN_SCHEMA, **dataclasses.asdict(origin)}, indent=2, ensure_ascii=False)
    write_atomic(origin_path(file), f"{text}\n".encode())


def _origin(data: Any) -> Origin:
    """Return an origin from its JSON. Raises `ValueError` for anything else."""
    fields = {field.name: field.type for field in dataclasses.fields(Origin)}
    kinds = {"str": str, "int": int, "bool": bool}
    if not isinstance(data, dict) or data.get("schema") != ORIGIN_SCHEMA or set(data) != {"schema", *fields}:
        raise ValueError("not an origin")
    if any(type(data[name]) is not kinds[str(kind)] for name, kind in fields.items()):
        raise ValueError("not an origin")
    return Origin(**{name: data[name] for name in fields})


def present(spec: ModelSpec, weight: WeightFile) -> bool:
    """Say whether a file of the hub is installed and comes from the file that the model's pins name."""
    file = spec.weight_path(weight)
    origin = read_origin(file) if file.is_file() else None
    return origin is not None and not _stale(origin, weight)


def _stale(origin: Origin, weight: WeightFile) -> bool:
    return bool(
        (weight.sha256 and weight.sha256 != origin.source_sha256) or (weight.git_sha1 and weight.git_sha1 != origin.source_git_sha1)
    )


def is_database(weight: WeightFile) -> bool:
    """Say whether a file is a mask database, which is larger than all networks together."""
    return weight.part == "data" and weight.path.endswith(".zip")


def hashes_of(path: Path) -> tuple[str, str]:
    """Return the sha256 of a file, and the SHA-1 that git gives its content."""
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    return sha256.hexdigest(), git.hexdigest()


# --- licences -----------------------------------------------------------------------------------


def check_licence(name: str, licence: Licence, *, accepted: bool, commercial: bool, where: str = "", command: str = "") -> None:
    """Refuse weights whose licence is not accepted, or does not allow the commercial use that is asked for.

    `where` is an address for the terms when the licence names none, `command` what to repeat. Raises `CannotRun`.
    """
    check_commercial(name, licence, commercial=commercial)
    if not accepted:
        terms = licence.url or where
        raise CannotRun(f"the weights of {name} are under the {_sentence(licence, terms)}, which is not accepted yet",
                        hint=f"read it, then  {command or f'maisi models pull {name}'} --accept-license")  # fmt: skip


def check_commercial(name: str, licence: Licence, *, commercial: bool) -> None:
    """Refuse weights without permission for commercial use where that is asked for. Raises `CannotRun`."""
    if commercial and not licence.commercial:
        others = [spec.name for spec in models() if spec.licence.commercial and spec.name != name]
        raise CannotRun(f"the licence of {name}, {licence.name}, does not allow commercial use",
                        hint=f"use {', '.join(others)}, or leave out --commercial for research")  # fmt: skip


def licence_text(licence: Licence, where: str = "") -> str:
    """Return a licence in words: its name, address, and whether commercial use is allowed."""
    return _sentence(licence, licence.url or where)


def _sentence(licence: Licence, terms: str) -> str:
    allowed = "allowed" if licence.commercial else "not allowed"
    return f"{licence.name} ({'; '.join(filter(None, (terms, f'commercial use {allowed}')))})"


# --- space and order ----------------------------------------------------------------------------


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse, before anything is written, what does not fit on the disk of `folder`. Raises `CannotRun`."""
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(standing).free
    if needed > free:
        raise CannotRun(f"{what} needs up to {needed / _MIB:.0f} MiB on the disk of {standing}, which has {free / _MIB:.0f} MiB free",
                        hint="free some space, or set MAISI_HOME to another disk")  # fmt: skip


def locked() -> contextlib.AbstractContextManager[None]:
    """Hold the folder of weights, so that two commands never write to it at once. Raises `CannotRun`."""
    return hold(
        home() / "models",
        busy="another command is changing the installed weights",
        elsewhere="set MAISI_HOME to a folder that can be written to",
    )


# --- archives -----------------------------------------------------------------------------------


def check_zip(path: Path, name: str) -> None:
    """Refuse a zip that is damaged, or whose members would be written outside of the folder that it is unpacked to."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{name} is not a whole zip: {error}", hint="fetch it again") from error
    outside = next((each for each in names if not inside(each)), None)
    if outside is not None:
        raise UsageError(f"{name} has a member that leads outside: {outside!r}", hint="do not use this file")


def inside(name: str) -> bool:
    """Say whether the name of an archive's member stays below the folder that it is unpacked to, on any system."""
    words = name.removesuffix("/").split("/")
    return "\\" not in name and ":" not in name and "\0" not in name and not name.startswith("/") and ".." not in words


# --- removal ------------------------------------------------------------------------------------


def remove(spec: ModelSpec) -> tuple[list[Path], list[Path]]:
    """Remove the installed files of a model; return what was removed, and what other installed models still use.

    Raises `UsageError` for a model whose files came with maisi or are the user's own.
    """
    if all(weight.repo is None for weight in spec.weights):
        whose = "came with maisi" if spec.bundled else "are your own"
        raise UsageError(f"the files of {spec.name} {whose} and are not removed", hint="remove files of your own yourself")
    used = {other.weight_path(weight) for other in models() if other.name != spec.name and other.installed(other.modes[0])
            for weight in other.weights}  # fmt: skip
    removed: list[Path] = []
    kept: list[Path] = []
    with locked():
        for weight in spec.weights:
            file = spec.weight_path(weight)
            if weight.repo is None or file in removed:
                continue
            if file in used:
                kept += [file] if file.is_file() else []
                continue
            source = file.with_name(PurePosixPath(weight.path).name)
            for each in (file, origin_path(file), *parts(file), *parts(source)):
                if each.is_file():
                    each.unlink()
                    removed.append(each)
            prune(file.parent)
    return removed, kept


def prune(folder: Path) -> None:
    """Remove a folder and those above it, below the folder of weights, as long as they are empty."""
    top = home() / "models"
    while folder != top and top in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


# --- bundles ------------------------------------------------------------------------------------


def export_bundle(specs: Sequence[ModelSpec], path: Path, *, force: bool = False, on_event: OnEvent = ignore) -> Bundle:
    """Write all installed files of the models to one tar, with a manifest of their sha256 that stands first.

    The same files make the same bytes. Raises `CannotRun` for a model that is not installed, `UsageError` for one that
    needs no bundle, `Rejected` for a file that is no longer what was installed.
    """
    refuse_overwriting(path, force=force)
    files: dict[Path, Origin | None] = {}
    for spec in specs:
        if all(weight.repo is None for weight in spec.weights):
            raise UsageError(f"model {spec.name} has no files from the hub", hint="copy its folder, or leave it out")
        if not spec.installed(spec.modes[0]):
            raise CannotRun(f"model {spec.name} is not installed", hint=pull_command(spec))
        found = [spec.weight_path(weight) for weight in spec.weights if weight.repo is not None]
        files |= {file: read_origin(file) for file in found if file.is_file()}
    total = sum(file.stat().st_size for file in files)
    require_space(path.parent, total, f"the bundle {path.name}")
    rows = []
    on_event(Stage(name="check"))
    for file, origin in files.items():
        sha256 = sha256_of(file)
        if origin is None or origin.sha256 != sha256:
            raise Rejected(f"{file} is not the file that was installed", hint="pull it again with --force")
        rows.append({"path": file.relative_to(home()).as_posix(), "sha256": sha256, "bytes": file.stat().st_size,
                     "origin": {"schema": ORIGIN_SCHEMA, **dataclasses.asdict(origin)}})  # fmt: skip
    licences = [{"name": spec.name, "licence": dataclasses.asdict(spec.licence)} for spec in specs]
    manifest = {"schema": BUNDLE_SCHEMA, "maisi": __version__, "models": licences, "files": rows}

    def write(out: IO[bytes]) -> None:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            text = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
            tar.addfile(_member("manifest.json", len(text)), io.BytesIO(text))
            for file, done in zip(files, range(1, len(files) + 1), strict=True):
                with file.open("rb") as content:
                    tar.addfile(_member(file.relative_to(home()).as_posix(), file.stat().st_size), content)
                on_event(Step(stage="export", done=done, total=len(files)))

    write_atomic(path, write)
    return Bundle(models=tuple(spec.name for spec in specs), files=tuple(files), present=(), bytes=path.stat().st_size)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info


def import_bundle(
    path: Path, *, accept_license: bool = False, commercial: bool = False, force: bool = False, on_event: OnEvent = ignore
) -> Bundle:  # fmt: skip
    """Install the files of a bundle: all of them, checked against its manifest, or none.

    Raises `UsageError` for what is not a whole bundle, or has a member that is not in the manifest, no plain file, or
    leads outside; `CannotRun` for a licence that is not accepted and a disk without room.
    """
    if not path.is_file():
        raise UsageError(f"there is no bundle {path}", hint="give the file that  maisi models export  wrote")
    try:
        with tarfile.open(path, mode="r:") as tar:
            members = iter(tar)
            manifest = _manifest(tar, next(members, None), path)
            for each in manifest["models"]:
                check_licence(each["name"], each["licence"], accepted=accept_license, commercial=commercial,
                              command=f"maisi models import {path}")  # fmt: skip
            rows = {row["path"]: row for row in manifest["files"]}
            require_space(home(), sum(row["bytes"] for row in rows.values()), f"the bundle {path.name}")
            with locked(), tempfile.TemporaryDirectory(prefix=".import-", dir=home() / "models") as staging:
                staged = _unpack(tar, members, rows, Path(staging), path, on_event)
                return _install(manifest, staged, path, force=force, on_event=on_event)
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"{path} is not a whole bundle: {error}", hint="copy it again; it is a tar that  maisi models export  wrote"
        ) from error
    except OSError as error:
        raise CannotRun(f"cannot unpack {path}: {error.strerror or error}", hint="free disk space, or set MAISI_HOME") from error


def _manifest(tar: tarfile.TarFile, member: tarfile.TarInfo | None, path: Path) -> dict[str, Any]:
    """Return the checked manifest of a bundle, with licences and origins as types."""
    wrong = UsageError(f"{path} is not a bundle of maisi: its manifest is missing or of another form",
                       hint="give the file that  maisi models export  wrote")  # fmt: skip
    if member is None or member.name != "manifest.json" or not member.isreg() or member.size > _MANIFEST_MAX:
        raise wrong
    try:
        data = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
        if data["schema"] != BUNDLE_SCHEMA:
            raise wrong
        known = {spec.name: spec.licence for spec in (*models(), *extractors())}  # what the bundle says counts for other models only
        found = [{"name": each["name"], "licence": known.get(each["name"]) or _licence(each["licence"])} for each in data["models"]]
        rows = [{**row, "origin": _origin(row["origin"])} for row in data["files"]]
        whole = all(row["origin"].sha256 == row["sha256"] and row["origin"].bytes == row["bytes"] >= 0 for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise wrong from error
    if not found or not rows or not whole:
        raise wrong
    for row in rows:
        if not _may_install(row["path"]):
            raise UsageError(f"{path} wants to write {row['path']!r}, which is no place for weights", hint="do not use this file")
    return {"models": found, "files": rows}


def _licence(data: Any) -> Licence:
    """Return a licence from its JSON. Raises `TypeError` or `KeyError` for anything else."""
    licence = Licence(name=data["name"], url=data["url"], commercial=data["commercial"])
    if not (isinstance(licence.name, str) and isinstance(licence.url, str) and isinstance(licence.commercial, bool)):
        raise TypeError("not a licence")
    return licence


def _may_install(name: Any) -> bool:
    """Say whether a path of a bundle is one of weights: models/OWNER/REPO/REVISION/..., of a kind that runs no code."""
    words = name.split("/") if isinstance(name, str) else []
    return (len(words) >= 5 and words[0] == "models" and all(re.fullmatch(HUB_NAME, word) for word in words)
            and words[-1].endswith(_BUNDLED_KINDS) and not words[-1].endswith(".origin.json"))  # fmt: skip


def _unpack(
    tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo], rows: dict[str, Any], staging: Path, path: Path, on_event: OnEvent
) -> dict[str, Path]:  # fmt: skip
    """Write each member to the staging folder under a number, checked; return the files by their names."""
    on_event(Stage(name="import"))
    staged: dict[str, Path] = {}
    for member in members:
        row = rows.get(member.name)
        if row is None or not member.isreg() or member.name in staged:
            raise UsageError(f"{path} has a member that its manifest does not name: {member.name!r}", hint="do not use this file")
        file = staging / str(len(staged))
        digest, size = hashlib.sha256(), 0
        source = tar.extractfile(member)
        assert source is not None
        with file.open("wb") as out:
            while block := source.read(_BLOCK):
                digest.update(block)
                size += len(block)
                out.write(block)
        if size != row["bytes"] or digest.hexdigest() != row["sha256"]:
            raise UsageError(f"{path} is damaged: {member.name} is not what the manifest names", hint="copy the bundle again")
        if member.name.endswith(".zip"):
            check_zip(file, f"{member.name} in {path}")
        staged[member.name] = file
        on_event(Step(stage="import", done=len(staged), total=len(rows)))
    lacking = [name for name in rows if name not in staged]
    if lacking:
        raise UsageError(f"{path} is not whole: it lacks {lacking[0]}", hint="copy the bundle again")
    return staged


def _install(manifest: dict[str, Any], staged: dict[str, Path], path: Path, *, force: bool, on_event: OnEvent) -> Bundle:
    """Move checked files into place; those that are there already stay."""
    there: list[Path] = []
    new: list[tuple[Path, Path, Origin]] = []
    for row in manifest["files"]:
        file = home() / row["path"]
        if file.is_file() and sha256_of(file) == row["sha256"]:
            there.append(file)
        elif file.exists() and not force:
            raise UsageError(f"{file} exists and differs from the one in {path.name}", hint="add --force to replace it")
        else:
            new.append((staged[row["path"]], file, row["origin"]))
        if file in there and read_origin(file) is None:
            write_origin(file, row["origin"])
    for source, file, origin in new:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_origin(file, origin)
        source.replace(file)
    if there:
        on_event(Note(text=f"{len(there)} of {len(manifest['files'])} files were there already"))
    names = tuple(each["name"] for each in manifest["models"])
    return Bundle(models=names, files=tuple(file for _, file, _ in new), present=tuple(there), bytes=_size(file for _, file, _ in new))


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
