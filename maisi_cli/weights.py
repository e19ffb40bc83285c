"""Weight files: where they lie, and how they are read and written without running anything that they contain."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import hub, store
from .catalog import ModelSpec, WeightFile, home, pull_command
from .errors import CannotRun, MaisiError, UsageError
from .events import Note, OnEvent, Saved, Stage, ignore
from .files import write_atomic
from .record import sha256_of

# top-level key of the released checkpoints that holds the tensors, by layout
_INNER = {"state_dict": "unet_state_dict", "unet": "unet_state_dict", "mask_unet": "unet_state_dict",
          "controlnet": "controlnet_state_dict"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The tensors of one network, the latent scale factor when the file holds one, and the file's sha256."""

    tensors: Mapping[str, Tensor]
    scale_factor: float | None
    sha256: str


def locate(model: ModelSpec, parts: tuple[str, ...] | list[str]) -> dict[str, Path]:
    """Return the file of each part. Raises `CannotRun` that names the command which installs what is missing."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for part in parts:
        weight = next((weight for weight in model.weights if weight.part == part), None)
        if weight is None:
            raise UsageError(f"model {model.name} lists no weights for its {part}", hint=f"see  maisi models show {model.name}")
        path = model.weight_path(weight)
        if path.is_file():
            found[part] = path
        else:
            missing.append(str(path))
    if missing:
        raise CannotRun(f"model {model.name} is not installed: {missing[0]} is missing",
                        hint=pull_command(model))  # fmt: skip
    return found


def load_state(path: Path, layout: str = "safetensors") -> State:
    """Read the tensors of one network; never unpickles code.

    `layout` is `safetensors`, or that of a released `.pt`: `state_dict`, `unet`, `mask_unet`, `controlnet`. Raises
    `UsageError` for a damaged file, one with code in it, or one of another layout.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    tensors, scale = _read_released(path, layout)
    return State(tensors=tensors, scale_factor=scale, sha256=sha256_of(path))


def _read_released(path: Path, layout: str, *, mmap: bool = False) -> tuple[dict[str, Tensor], float | None]:
    """Return the tensors and the scale factor of a released `.pt`; with `mmap` the optimiser's state stays on the disk."""
    import monai.data  # noqa: F401  registers MetaTensor as safe to load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an odd protocol: what cannot be read is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} is damaged, or holds more than tensors, and is not loaded",
                         hint="use the released file, or convert it to safetensors where you trust it") from error  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way
        raise _damaged(path, error) from error
    tensors: Any = content
    inner = _INNER.get(layout)
    if isinstance(content, Mapping) and inner in content:
        tensors = content[inner]
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise UsageError(f"{path} does not have the layout {layout!r}", hint="check which part of the model it is")
    scale = content.get("scale_factor") if isinstance(content, Mapping) else None
    return {key: torch.as_tensor(value) for key, value in tensors.items()}, _scale(scale, path)


def _load_safetensors(path: Path) -> State:
    tensors, scale = _read_safetensors(path)
    return State(tensors=tensors, scale_factor=scale, sha256=sha256_of(path))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], float | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return tensors, _scale(meta.get("scale_factor"), path)


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} is damaged: {(str(error).splitlines() or ['empty'])[0]}", hint="fetch the file again")


def _scale(value: Any, path: Path) -> float | None:
    """Return the scale factor of a file, a number or a tensor of one; anything else is refused."""
    try:
        scale = None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} has a scale factor that is no number", hint="fetch the file again") from error
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"{path} has the scale factor {scale:g}", hint="fetch the file again")
    return scale


def save_state(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str], half: bool = True) -> Path:
    """Write tensors as safetensors, in float16 unless `half` is False; the file appears complete or not at all."""
    from safetensors.torch import save

    ready = {key: value.detach().cpu().to(torch.float16 if half and value.is_floating_point() else value.dtype).contiguous()
             for key, value in tensors.items()}  # fmt: skip
    write_atomic(path, save(ready, metadata=dict(metadata) or None))  # safetensors 0.8.0 breaks a file that has neither
    return path


def weights_home() -> Path:
    """Return the folder that installed weights live in: `MAISI_HOME`, or this user's data folder."""
    return home() / "models"


# --- installing ---------------------------------------------------------------------------------


def pull(
    spec: ModelSpec, *, accept_license: bool = False, commercial: bool = False, offline: bool = False, database: bool = False,
    force: bool = False, source: Path | None = None, on_event: OnEvent = ignore,
) -> list[store.Installed]:  # fmt: skip
    """Install the files of a model that are not installed yet, and return all of them.

    Each is fetched at its pinned revision, compared with its hash, and released checkpoints are converted to safetensors
    (float32, without the optimiser's state), after which the `.pt` is gone. `database` fetches the mask database as well,
    `force` everything anew; with `source` the files are taken from a folder that has them, which stays as it is, and no
    network is used. A failure leaves what is installed as it was; only what has arrived of a file waits, hidden,
    for the next try. Raises `CannotRun` for a licence that is not accepted, a hub that refuses or cannot be reached, a
    file with another hash and a disk without room, `UsageError` for a file that is no checkpoint of its network.
    """
    store.check_commercial(spec.name, spec.licence, commercial=commercial)
    wanted = [weight for weight in spec.weights if weight.repo is not None and (database or not store.is_database(weight))]
    if not wanted:
        return _own(spec, on_event)
    lacking = [weight for weight in wanted if force or not store.present(spec, weight)]
    if lacking:
        by_hand = next((weight for weight in lacking if weight.source), None)
        if source is None and by_hand is not None:
            raise CannotRun(f"{Path(by_hand.path).name} is on no hub that maisi can fetch from; it is published at {by_hand.source}",
                            hint=f"fetch it there, then  {pull_command(spec)} --accept-license --from FOLDER")  # fmt: skip
        store.check_licence(spec.name, spec.licence, accepted=accept_license, commercial=commercial,
                            where=hub.page(str(wanted[0].repo)), command=pull_command(spec))  # fmt: skip
        if source is None and (offline or hub.offline()):
            raise CannotRun(f"model {spec.name} is not installed, and nothing is fetched offline",
                            hint="maisi models import BUNDLE  installs what  maisi models export  wrote elsewhere")  # fmt: skip
        for weight in lacking:
            file = spec.weight_path(weight)
            if file.exists() and not force and store.read_origin(file) is None:
                raise UsageError(f"{file} is there, but was not installed by maisi", hint="add --force to replace it, or move it away")
        with store.locked():
            if source is None:
                _fetch_all(spec, lacking, on_event)
            else:
                wanted = [*(weight for weight in wanted if weight not in lacking), *_take_all(spec, lacking, source, on_event)]
    left_out = [weight for weight in spec.weights if store.is_database(weight) and weight not in wanted and not store.present(spec, weight)]
    for weight in left_out if source is None else ():
        on_event(Note(text=f"left out {weight.path}{f' ({weight.mib:g} MiB)' if weight.mib else ''}: add --mask-database for it"))
    return [_installed(spec, weight, "fetched" if weight in lacking else "present") for weight in wanted]


def _own(spec: ModelSpec, on_event: OnEvent) -> list[store.Installed]:
    if not spec.bundled:
        raise UsageError(f"model {spec.name} lists no file of a hub", hint=f"put its files beside {spec.path}")
    on_event(Note(text=f"{spec.name} comes with maisi: there is nothing to fetch"))
    return [_installed(spec, weight, "present") for weight in spec.weights if spec.weight_path(weight).is_file()]


def _installed(spec: ModelSpec, weight: WeightFile, status: str) -> store.Installed:
    file = spec.weight_path(weight)
    origin = store.read_origin(file)
    return store.Installed(part=weight.part, file=file, status=status, bytes=file.stat().st_size, sha256=origin.sha256 if origin else None)


def _fetch_all(spec: ModelSpec, lacking: Sequence[WeightFile], on_event: OnEvent) -> None:
    """Fetch and install files from the hub, one after the other."""
    on_event(Stage(name="ask", detail=hub.endpoint()))
    remotes = [hub.probe(weight) for weight in lacking]  # what the hub refuses is known before anything is fetched
    for weight, remote in zip(lacking, remotes, strict=True):
        _check_promise(weight, remote)
    places = [spec.weight_path(weight).with_name(Path(weight.path).name) for weight in lacking]
    sizes = [remote.bytes or int((weight.mib or 0) * 2**20) for weight, remote in zip(lacking, remotes, strict=True)]
    arrived = sum(part.stat().st_size for place in places for part in hub.parts(place))
    store.require_space(home(), _space(lacking, sizes) - arrived, f"model {spec.name}")
    try:
        for weight, remote, place in zip(lacking, remotes, places, strict=True):
            on_event(Stage(name="fetch", detail=f"{weight.path}, in MiB"))
            part = hub.fetch(remote, place, on_event)
            try:
                _install(spec, weight, part, on_event, remote=remote)
            except UsageError:
                part.unlink()
                raise
            part.unlink(missing_ok=True)  # it was converted, where it was not moved
    finally:
        for place in places:
            store.prune(place.parent)


def _take_all(spec: ModelSpec, lacking: Sequence[WeightFile], source: Path, on_event: OnEvent) -> list[WeightFile]:
    """Install files from a folder that has them, by their path on the hub or by their name; return those that it has."""
    if not source.is_dir():
        raise UsageError(f"there is no folder {source}", hint="give the folder that holds the released files")
    needed = {part for mode in spec.modes for part in spec.parts_for(mode)}
    found: dict[WeightFile, Path] = {}
    for weight in lacking:
        file = next((file for file in (source / weight.path, source / Path(weight.path).name) if file.is_file()), None)
        if file is not None:
            found[weight] = file
        elif weight.part in needed:
            raise UsageError(f"{source} has no {weight.path}", hint="give the folder that holds it, or leave out --from to fetch it")
        else:
            on_event(Note(text=f"left out {weight.path}: {source} does not have it"))
    store.require_space(home(), _space(list(found), [file.stat().st_size for file in found.values()]), f"model {spec.name}")
    for weight, file in found.items():
        _install(spec, weight, file, on_event)
    return list(found)


def _space(weights: Sequence[WeightFile], sizes: Sequence[int]) -> int:
    """Return the bytes that may be needed: every file, and the largest once more while it is converted."""
    converted = [size for weight, size in zip(weights, sizes, strict=True) if weight.layout != "data"]
    return sum(sizes) + max(converted, default=0)


def _check_promise(weight: WeightFile, remote: hub.Remote) -> None:
    """Refuse a file that the hub itself says is another than the pinned one."""
    for pin, found in zip((weight.sha256, weight.git_sha1), _promised(remote), strict=True):
        if pin and found and found != pin:
            raise CannotRun(f"the hub has another {weight.path} of {weight.repo}: its hash is {found[:12]}, not {pin[:12]}",
                            hint="the publisher replaced it: update maisi")  # fmt: skip


def _promised(remote: hub.Remote | None) -> tuple[str, str]:
    """Return the sha256 and git's SHA-1 that the hub states, each empty where its etag is no such hash."""
    etag = (remote.etag if remote else None) or ""
    return (etag if re.fullmatch("[0-9a-f]{64}", etag) else "", etag if re.fullmatch("[0-9a-f]{40}", etag) else "")


def _install(spec: ModelSpec, weight: WeightFile, file: Path, on_event: OnEvent, *, remote: hub.Remote | None = None) -> None:
    """Check a file and put it where it belongs, converted where it is a released checkpoint.

    A file that was fetched (`remote`) is moved, one of the user's is copied.
    """
    name = f"{weight.path} of {weight.repo}" if remote else str(file)
    sha256, git_sha1 = store.hashes_of(file)
    promised = _promised(remote)
    for wanted, found in ((weight.sha256, sha256), (weight.git_sha1, git_sha1), (promised[0], sha256), (promised[1], git_sha1)):
        if wanted and wanted != found:
            if remote is None:
                raise UsageError(f"{name} is not the released file: its hash is {found[:12]}, not {wanted[:12]}",
                                 hint="fetch it again, or describe it in a model file of your own")  # fmt: skip
            file.unlink()
            raise CannotRun(f"{name} arrived damaged: its hash is {found[:12]}, not {wanted[:12]}; it was not kept",
                            hint="run it again, or check HF_ENDPOINT where it is set")  # fmt: skip
    pinned = bool(weight.sha256 or weight.git_sha1)
    if not pinned:
        known = "compared with the hub's own hash" if any(promised) else "compared with nothing"
        on_event(Note(text=f"no hash of {weight.path} is known; it was {known}", level="info" if any(promised) else "warning"))
    target, size = spec.weight_path(weight), file.stat().st_size
    origin = store.Origin(
        sha256="", bytes=0, repo=str(weight.repo), revision=(remote.commit if remote else None) or weight.revision or "main",
        path=weight.path, layout=weight.layout, source_sha256=sha256, source_git_sha1=git_sha1, source_bytes=size, pinned=pinned,
        licence=spec.licence.name, licence_url=spec.licence.url or hub.page(str(weight.repo)), commercial=spec.licence.commercial,
    )  # fmt: skip
    ready = target.with_name(f".{target.name}.part")
    try:
        if weight.layout != "data":
            on_event(Stage(name="convert", detail=weight.path))
            convert(file, ready, spec, weight)
        else:
            if weight.path.endswith(".zip"):
                store.check_zip(file, name)
            if remote is None:
                write_atomic(ready, lambda out: _copy(file, out))
            else:
                ready = file
    except UsageError as error:  # the name that the user knows, not that of the partial file
        raise UsageError(error.message.replace(str(file), name), hint="nothing of it was kept") from error
    try:
        store.write_origin(target, dataclasses.replace(origin, sha256=sha256_of(ready), bytes=ready.stat().st_size))
        ready.replace(target)
    except BaseException:
        if ready != file:
            ready.unlink(missing_ok=True)
        raise
    on_event(Saved(path=target, kind=weight.part))


def _copy(file: Path, out: IO[bytes]) -> None:
    with file.open("rb") as content:
        shutil.copyfileobj(content, out, 2**20)


def convert(source: Path, target: Path, spec: ModelSpec, weight: WeightFile) -> Path:
    """Write the tensors that a network has from those of a checkpoint to `target`, as safetensors in the dtypes that they have.

    Nothing is unpickled but tensors and plain values; the keys must be those of the network, but for the unused
    projections of ddpm-ct, which are dropped. The scale factor becomes metadata. The same checkpoint makes the same
    bytes. Raises `UsageError` for any other file.
    """
    kept, scale = _fitted(spec, weight, source)
    if weight.part == "unet" and scale is None and spec.scale_factor is None:
        raise UsageError(f"{source} has no scale factor", hint="add scale_factor to the model's file")
    # one entry at most: with more, safetensors writes them in an order that differs from run to run
    return save_state(target, kept, metadata={} if scale is None else {"scale_factor": repr(scale)}, half=False)


# --- verifying ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What `verify` found about a file: `ok`, `changed`, `stale`, `unfit` or `missing`; `detail` says more."""

    part: str
    file: Path
    status: str
    detail: str
    sha256: str | None


def verify(spec: ModelSpec, *, on_event: OnEvent = ignore) -> list[Check]:
    """Hash every installed file of a model anew, and check that networks and weights have the same keys and shapes.

    A file that is `changed` differs from what was installed, one that is `stale` comes from another publication than the
    model's pins name. Files of one's own and those that come with maisi have no hash to compare with. Raises `CannotRun`
    when no file is there.
    """
    files = {weight: spec.weight_path(weight) for weight in spec.weights}
    if not any(file.is_file() for file in files.values()):
        raise CannotRun(f"model {spec.name} is not installed", hint=pull_command(spec))
    needed = {part for mode in spec.modes for part in spec.parts_for(mode)}
    checks = []
    for weight, file in files.items():
        if file.is_file():
            on_event(Stage(name="verify", detail=file.name))
            checks.append(_checked(spec, weight, file))
        elif weight.part in needed:
            checks.append(Check(part=weight.part, file=file, status="missing", detail="not there", sha256=None))
    return checks


def _checked(spec: ModelSpec, weight: WeightFile, file: Path) -> Check:
    sha256, origin = sha256_of(file), store.read_origin(file)

    def found(status: str, detail: str) -> Check:
        return Check(part=weight.part, file=file, status=status, detail=detail, sha256=sha256)

    if origin is not None and origin.sha256 != sha256:
        return found("changed", f"its hash is {sha256[:12]}, not {origin.sha256[:12]}")
    if origin is not None and not store.present(spec, weight):
        return found("stale", "comes from another publication than this version of maisi knows")
    if weight.layout != "data":
        try:
            _fitted(spec, weight, file)
        except MaisiError as error:
            return found("unfit", error.message)
    if weight.repo is not None and origin is None:
        return found("changed", "was not installed by maisi, or its origin is gone")
    return found("ok", "" if origin is not None else "no hash is known")


def _fitted(spec: ModelSpec, weight: WeightFile, file: Path) -> tuple[dict[str, Tensor], float | None]:
    """Return the tensors that a network has from a file, and the scale factor. Raises `UsageError` when they do not fit."""
    from .networks import build, fitting

    if weight.part not in spec.networks:
        raise UsageError(f"model {spec.name} has no {weight.part}", hint=f"see  maisi models show {spec.name}")
    if weight.layout == "safetensors" or file.suffix == ".safetensors":
        tensors, scale = _read_safetensors(file)
    else:
        tensors, scale = _read_released(file, weight.layout, mmap=True)
    with torch.device("meta"):  # names and shapes alone: no memory, no time
        network = build(spec.networks[weight.part])
    return fitting(network, tensors, file), scale
