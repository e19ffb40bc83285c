"""The data of training: lists of cases (`lists`), their latents (`encoding`), and phantom cases (`phantoms`)."""

from __future__ import annotations

from .encoding import encode, intensity
from .lists import HELD_OUT, LIST_NAME, Case, data_hashes, read_list, read_lists, split, write_list
from .phantoms import make_phantoms

__all__ = [
    "HELD_OUT",
    "LIST_NAME",
    "Case",
    "data_hashes",
    "encode",
    "intensity",
    "make_phantoms",
    "read_list",
    "read_lists",
    "split",
    "write_list",
]
