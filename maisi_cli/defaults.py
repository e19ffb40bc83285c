"""The built-in plugin: everything that comes with `maisi`, registered as a third party would."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .hookspecs import Register, hookimpl


@hookimpl
def register_models(register: Register) -> None:
    """Register the released models and the bundled one."""
    for path in sorted(Path(str(files("maisi_cli") / "data" / "models")).glob("*.toml")):
        register(path.stem, path)


@hookimpl
def register_checks(register: Register) -> None:
    """Register the quality checks."""
    room = "maisi_cli.quality"
    register("hu-median", f"{room}:hu_median", summary="median HU of seven organs against real scans")
    register("organs-present", f"{room}:organs_present", summary="the organs asked for are in the mask")
    register("labels-known", f"{room}:labels_known", summary="every label id is in the vocabulary")
    register("intensity", f"{room}:intensity", summary="values are finite and not all the same")
    register("clipped", f"{room}:clipped", summary="share of the body at the ends of the HU scale")
    register("follows-mask", f"{room}:follows_mask", summary="HU steps across organ borders (informative)")
