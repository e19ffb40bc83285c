"""Checkpoints: everything that training changes, written so that a run goes on exactly where it stopped, or says why it cannot.

A checkpoint is a folder `checkpoints/step_00000010/` of safetensors files and `state.json`, which has the hash of each of them and
its own. It is made under another name and renamed when it is complete. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CannotRun, UsageError
from ..files import refuse_overwriting, write_atomic
from ..record import sha256_of
from ..team import Team
from .distributed import like, whole
from .settings import TrainSettings
from .tracking import LOG

CHECKPOINTS = "checkpoints"
STATE = "state.json"
SCHEMA = "maisi.train/2"
FREE = ("steps", "max_minutes", "validate_every", "preview_every", "save_every", "keep_last", "trackers", "on_nan", "fast", "recompute",
        "device", "init", "unet", "vae")  # fmt: skip
"""Settings that may change when a run goes on: how long, how often and where; of starting weights the content counts."""

_SCALARS = ("step", "draws", "spoiled", "elapsed_s", "best", "validated")
_KEYS = ("schema", "kind", "settings", "data", "processes", *_SCALARS, "optimisers", "scaler", "numpy_rng", "files", "sha256")
_START_AGAIN = "start again without --resume in another --out"


@dataclass(slots=True, kw_only=True)
class Learner:
    """Everything that training changes.

    `draws` counts batches, those left out too; `spoiled` those left out in a row; `best` is the lowest score of validation,
    `validated` the step of the last one.
    `opponent` is the second network of an adversarial training.
    """

    network: nn.Module
    average: dict[str, Tensor]
    optimiser: Any
    rng: np.random.Generator
    scaler: Any = None
    opponent: nn.Module | None = None
    opponent_optimiser: Any = None
    step: int = 0
    draws: int = 0
    spoiled: int = 0
    elapsed_s: float = 0.0
    best: float = math.inf
    validated: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a run must agree on with a checkpoint: settings, hashes of data and starting weights, number of processes."""

    kind: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    processes: int

    @classmethod
    def of(cls, settings: TrainSettings, data: Mapping[str, str], processes: int) -> Identity:
        """Return the identity of a run; `data` are hashes by what they are of."""
        weights = {name: sha256_of(path) for name in ("init", "unet", "vae") if (path := getattr(settings, name))}
        fields = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
        return cls(kind=settings.kind, settings=json.loads(json.dumps(fields)), data={**data, **weights}, processes=processes)

    def differences(self, content: Mapping[str, Any]) -> list[str]:
        """Return in words what a checkpoint was made with otherwise."""
        was, now = content["settings"], self.settings
        changed = [f"train.{name} was {_shown(was.get(name))}, is {_shown(now.get(name))}"
                   for name in sorted({*was, *now}) if name not in FREE and was.get(name) != now.get(name)]  # fmt: skip
        if content["kind"] != self.kind:
            changed.insert(0, f"it is of train {content['kind']}")
        before = content["data"]
        changed += [f"the {name} is another" for name in sorted({*before, *self.data}) if before.get(name) != self.data.get(name)]
        if content["processes"] != self.processes:
            changed.append(f"processes were {content['processes']}, are {self.processes} (--gpus)")
        return changed


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)


# --- where a run starts -----------------------------------------------------------------------------


def starting_point(out: Path, written: Sequence[Path], resume: str | None, *, force: bool) -> Path | None:
    """Return the checkpoint that a run goes on from, or None for one that begins, whose folder is clear then.

    `written` are the weights that the run exports. With `force` what an earlier run left is removed. Raises `UsageError` where
    something would be lost: an earlier run, later checkpoints, weights without their checkpoint.
    """
    _sweep(out, written)
    mine = checkpoints(out)
    if resume == "auto":
        if mine:
            return mine[-1]
        left = [path for path in (*written, out / LOG) if path.exists()]
        if left:
            raise UsageError(f"{left[0]} is there, but {out / CHECKPOINTS} is not: this run cannot go on",
                             hint="bring the checkpoints back, or start again with --force and without --resume")  # fmt: skip
        return None
    if resume is None:
        _clear(out, written, force=force)
        return None
    chosen = Path(resume).parent if Path(resume).name == STATE else Path(resume)
    if not (chosen / STATE).is_file():
        raise UsageError(f"there is no training state {resume}", hint=f"use --resume auto, or a folder such as {CHECKPOINTS}/step_00000100")
    if chosen.absolute().parent != (out / CHECKPOINTS).absolute():
        _clear(out, written, force=force)
        return chosen
    later = [path for path in mine if path.name > chosen.name]
    if later and not force:
        raise UsageError(f"{later[-1]} is later than {chosen.name} and would be lost",
                         hint="add --force to remove it, or go on in another --out")  # fmt: skip
    for path in later:
        _remove(path)
    return chosen


def refuse_losing(starts: Mapping[str, str | None], written: Sequence[Path], out: Path) -> None:
    """Refuse a run that would write over the weights it starts from. `starts` are files by the option that names them."""
    for name, file in starts.items():
        if file is None:
            continue
        path = Path(file).resolve()
        if path in [each.resolve() for each in written] or path.is_relative_to((out / CHECKPOINTS).resolve()):
            raise UsageError(
                f"--out {out} would overwrite --{name} {file}", hint="choose another --out; starting weights are never written"
            )


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in (out / CHECKPOINTS).glob("step_*") if path.is_dir())


def _sweep(out: Path, written: Sequence[Path]) -> None:
    """Remove what a killed run left half written."""
    for path in (out / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(path)
    patterns = [
        *(f".{path.name}.*.part" for path in written),
        ".log.*.part",
        "previews/.step_*.part",
        f"{CHECKPOINTS}/step_*/.{STATE}.*.part",
    ]
    for part in [each for pattern in patterns for each in out.glob(pattern)]:
        part.unlink()


def _clear(out: Path, written: Sequence[Path], *, force: bool) -> None:
    old = [path for path in (out / CHECKPOINTS, *written) if path.exists() and not (path.is_dir() and not any(path.iterdir()))]
    for path in old:
        refuse_overwriting(path, force=force)
    for path in checkpoints(out):
        _remove(path)
    for path in (*written, out / LOG):
        path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen half removed."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


# --- writing ----------------------------------------------------------------------------------------


def save(out: Path, learner: Learner, identity: Identity, ranks: Team, *, keep_last: int) -> Path:
    """Write a checkpoint of all processes, and remove all but the last `keep_last`; return its folder.

    All processes must call it. A checkpoint of this step that is there already only gets what validation has changed since.
    Raises `CannotRun` for a disk that is full.
    """
    folder = out / CHECKPOINTS / f"step_{learner.step:08d}"
    groups = _groups(learner)
    generators = ranks.gather(_generators(learner))
    if ranks.rank == 0:
        try:
            if folder.exists():
                _amend(folder, learner)
            else:
                _write(folder, groups, generators, learner, identity)
            for path in checkpoints(out)[:-keep_last]:
                _remove(path)
        except OSError as error:
            raise CannotRun(
                f"cannot write {folder}: {error.strerror or error}", hint="free disk space; the last checkpoint is whole"
            ) from error
    ranks.share(None)  # nobody goes on before it is written
    return folder


def _groups(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Return all tensors by file, whole and on the processor."""
    groups = {"model": learner.network.state_dict(), "average": learner.average, "optimiser": moments(learner.optimiser, learner.network)}
    if learner.opponent is not None:
        groups["opponent"] = learner.opponent.state_dict()
        groups["opponent_optimiser"] = moments(learner.opponent_optimiser, learner.opponent)
    return {group: {key: whole(value).detach().cpu().contiguous() for key, value in tensors.items()} for group, tensors in groups.items()}


def moments(optimiser: Any, network: nn.Module) -> dict[str, Tensor]:
    """Return an optimiser's state by parameter: `encoder.weight/exp_avg`."""
    names = [name for name, _ in network.named_parameters()]
    state = optimiser.state_dict()["state"]
    return {f"{names[number]}/{key}": value for number, row in state.items() for key, value in row.items()}


def _generators(learner: Learner) -> dict[str, Any]:
    """Return the random states of this process."""
    found = {"numpy": learner.rng.bit_generator.state, "torch": torch.get_rng_state()}
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def _write(
    folder: Path, groups: dict[str, dict[str, Tensor]], generators: Sequence[Mapping[str, Any]], learner: Learner, identity: Identity
) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = {f"{rank}/{kind}": value for rank, row in enumerate(generators) for kind, value in row.items() if kind != "numpy"}
    try:
        for group, tensors in {**groups, "rng": rng}.items():
            save_file({key: value.clone() for key, value in tensors.items()}, part / f"{group}.safetensors")
        optimisers = {"optimiser": learner.optimiser, "opponent_optimiser": learner.opponent_optimiser}
        content = {
            "schema": SCHEMA, "kind": identity.kind, "settings": identity.settings, "data": identity.data, "processes": identity.processes,
            **_scalars(learner),
            "optimisers": {name: each.state_dict()["param_groups"] for name, each in optimisers.items() if each is not None},
            "scaler": learner.scaler.state_dict() if learner.scaler is not None else None,
            "numpy_rng": [row["numpy"] for row in generators],
            "files": {path.name: sha256_of(path) for path in sorted(part.iterdir())},
        }  # fmt: skip
        (part / STATE).write_bytes(_sealed(content))
        for path in part.iterdir():
            _flush(path)
        _flush(part)
        part.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _amend(folder: Path, learner: Learner) -> None:
    content = _content(folder)
    content.update({name: _scalars(learner)[name] for name in ("elapsed_s", "best", "validated")})
    write_atomic(folder / STATE, _sealed(content))


def _scalars(learner: Learner) -> dict[str, Any]:
    values = {name: getattr(learner, name) for name in _SCALARS}
    return {**values, "best": values["best"] if math.isfinite(values["best"]) else None}


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return JSON with its own hash in it."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return json.dumps({**body, "sha256": _hash(body)}, indent=1).encode()


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Let a file or the names in a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading ----------------------------------------------------------------------------------------


def restore(folder: Path, learner: Learner, identity: Identity, ranks: Team) -> None:
    """Put a checkpoint into a learner and the generators of this process.

    Raises `UsageError` that names what is missing, damaged or of another run, before anything is changed.
    """
    content = _content(folder)
    changed = identity.differences(content)
    if changed:
        raise _cannot(
            folder, f"it was made otherwise: {'; '.join(changed)}", "use the same settings and data, or start again in another --out"
        )
    groups = _read_groups(folder, content, learner)
    if (content["scaler"] is None) != (learner.scaler is None):
        raise _cannot(folder, "it has no scaler of fp16, or one too many", "train on the same kind of device")
    _fill(learner.network.state_dict(), groups["model"])
    _fill(learner.average, groups["average"])
    _load_moments(learner.optimiser, learner.network, groups["optimiser"], content["optimisers"]["optimiser"])
    if learner.opponent is not None:
        _fill(learner.opponent.state_dict(), groups["opponent"])
        _load_moments(
            learner.opponent_optimiser, learner.opponent, groups["opponent_optimiser"], content["optimisers"]["opponent_optimiser"]
        )
    if learner.scaler is not None:
        learner.scaler.load_state_dict(content["scaler"])
    learner.rng.bit_generator.state = content["numpy_rng"][ranks.rank]
    torch.set_rng_state(groups["rng"][f"{ranks.rank}/torch"])
    if torch.cuda.is_available() and f"{ranks.rank}/cuda" in groups["rng"]:
        torch.cuda.set_rng_state(groups["rng"][f"{ranks.rank}/cuda"])
    for name in _SCALARS:
        setattr(learner, name, content[name])
    learner.best = math.inf if content["best"] is None else content["best"]


def _content(folder: Path) -> dict[str, Any]:
    """Return what `state.json` holds. Raises `UsageError` where it is damaged or lacks a part."""
    path = folder / STATE
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise _cannot(folder, f"{STATE} is missing") from error
    except (OSError, ValueError) as error:
        raise _cannot(folder, f"{STATE} is damaged") from error
    if not isinstance(content, dict):
        raise _cannot(folder, f"{STATE} is damaged")
    if content.get("schema", SCHEMA) != SCHEMA:
        raise _cannot(folder, f"its schema is {content['schema']!r}, not {SCHEMA!r}")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise _cannot(folder, f"{STATE} lacks {', '.join(missing)}")
    if content["sha256"] != _hash({key: value for key, value in content.items() if key != "sha256"}):
        raise _cannot(folder, f"{STATE} was changed since it was written")
    return content


def _read_groups(folder: Path, content: Mapping[str, Any], learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every file that this learner needs, each with exactly the names and shapes that it has."""
    wanted = {"model": learner.network.state_dict(), "average": learner.average}
    names = ["model", "average", "optimiser", "rng"]
    if learner.opponent is not None:
        wanted["opponent"] = learner.opponent.state_dict()
        names += ["opponent", "opponent_optimiser"]
    if unneeded := set(content["files"]) - {f"{name}.safetensors" for name in names}:
        raise _cannot(folder, f"it holds {', '.join(sorted(unneeded))}, which this training does not have")
    groups = {}
    for name in names:
        path = folder / f"{name}.safetensors"
        if path.name not in content["files"]:
            raise _cannot(folder, f"{STATE} lacks {path.name}")
        if not path.is_file():
            raise _cannot(folder, f"{path.name} is missing")
        if sha256_of(path) != content["files"][path.name]:
            raise _cannot(folder, f"{path.name} is damaged")
        groups[name] = load_file(path)
    for name, targets in wanted.items():
        odd = [key for key in {**targets, **groups[name]}
               if key not in targets or key not in groups[name] or targets[key].shape != groups[name][key].shape]  # fmt: skip
        if odd:
            raise _cannot(folder, f"{name}.safetensors is of another network ({odd[0]})")
    return groups


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, target in targets.items():
        target.copy_(like(target, values[key]))


def _load_moments(optimiser: Any, network: nn.Module, tensors: Mapping[str, Tensor], param_groups: list[dict[str, Any]]) -> None:
    parameters = dict(network.named_parameters())
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        # a step count stays a number; what has the parameter's shape is sharded as it is
        state.setdefault(numbers[name], {})[kind] = like(parameters[name], value) if value.ndim else value
    groups = [{key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in param_groups]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _cannot(folder: Path, what: str, hint: str = _START_AGAIN) -> UsageError:
    return UsageError(f"{folder} cannot be resumed: {what}", hint=hint)
