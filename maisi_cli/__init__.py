"""Synthetic 3D CT and MR volumes with paired segmentation masks.

The public names are loaded when they are first used (PEP 562), so that `import maisi_cli` costs nothing:

>>> from maisi_cli import Geometry
>>> Geometry.parse(size="128x128x64", spacing="3x3x4").fov_mm
(384.0, 384.0, 256.0)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Geometry": "maisi_cli.geometry:Geometry",
    "GenerateSettings": "maisi_cli.settings:GenerateSettings",
    "Mask": "maisi_cli.volumes:Mask",
    "Sample": "maisi_cli.volumes:Sample",
    "Volume": "maisi_cli.volumes:Volume",
    "fid": "maisi_cli.comparison:compare",
    "generate": "maisi_cli.synthesis:generate",
    "hookimpl": "maisi_cli.hookspecs:hookimpl",
    "plan": "maisi_cli.planning:plan",
    "qc": "maisi_cli.quality:check",
    "train": "maisi_cli.train:train",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
