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
