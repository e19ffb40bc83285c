"""Weight files: where they lie, and how they are read and written without running anything that they contain."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .catalog import ModelSpec, home
from .errors import CannotRun, UsageError

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
                        hint=f"maisi models pull {model.name}")  # fmt: skip
    return found


def load_state(path: Path, layout: str = "safetensors") -> State:
    """Read the tensors of one network; never unpickles code.

    `layout` is `safetensors`, or that of a released `.pt`: `state_dict`, `unet`, `mask_unet`, `controlnet`. Raises
    `UsageError` for a damaged file, one with code in it, or one of another layout.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    import monai.data  # noqa: F401  registers MetaTensor as safe to load

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} is damaged, or holds more than tensors, and is not loaded",
                         hint="use the released file, or convert it to safetensors where you trust it") from error  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    tensors: Any = content
    inner = _INNER.get(layout)
    if isinstance(content, Mapping) and inner in content:
        tensors = content[inner]
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise UsageError(f"{path} does not have the layout {layout!r}", hint="check which part of the model it is")
    scale = content.get("scale_factor") if isinstance(content, Mapping) else None
    return State(tensors={key: torch.as_tensor(value) for key, value in tensors.items()}, scale_factor=_scale(scale, path),
                 sha256=sha256_of(path))  # fmt: skip


def _load_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return State(tensors=tensors, scale_factor=_scale(meta.get("scale_factor"), path), sha256=sha256_of(path))


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

    from .files import write_atomic

    ready = {key: value.detach().cpu().to(torch.float16 if half and value.is_floating_point() else value.dtype).contiguous()
             for key, value in tensors.items()}  # fmt: skip
    write_atomic(path, save(ready, metadata=dict(metadata)))
    return path


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_home() -> Path:
    """Return the folder that installed weights live in: `MAISI_HOME`, or this user's data folder."""
    return home() / "models"
