"""The model file of a mask generator that was trained: the model that it was trained for, with its own mask networks."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..catalog import ModelSpec
from ..files import write_atomic
from ..masks.sources import MASK_PARTS, SIZES

NAME = "model.toml"


def write(path: Path, spec: ModelSpec, files: Mapping[str, Path]) -> None:
    """Write a model file that is `spec` with `files` (`mask_vae`, `mask_unet`, `data`: the sizes) in place of its own.

    What is trained is named relative to the model file, so that both can move together.
    """
    import tomli_w

    content: dict[str, Any] = tomllib.loads(spec.path.read_text("utf-8"))
    content["name"] = f"{spec.name}-own-masks"
    content["summary"] = f"{spec.name} with mask networks of one's own"
    content.pop("bundled", None)
    kept = [_found_from_anywhere(row, spec) for row in content.pop("weights", ()) if not _replaced(row)]
    layout = {"data": {"layout": "data"}}
    own = [{"part": part, "path": _relative(file, path.parent), **layout.get(part, {})} for part, file in files.items()]
    write_atomic(path, tomli_w.dumps({**content, "weights": [*kept, *own]}).encode())


def _replaced(row: Mapping[str, Any]) -> bool:
    return row["part"] in MASK_PARTS or (row["part"] == "data" and SIZES in Path(row["path"]).name)


def _found_from_anywhere(row: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return an entry whose file is named in full, unless it lies where installed weights lie."""
    return dict(row) if row.get("repo") else {**row, "path": str((spec.path.parent / row["path"]).absolute())}


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.absolute(), folder.absolute())).as_posix()
