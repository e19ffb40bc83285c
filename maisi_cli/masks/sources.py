"""What a mask source is: a function, or a class that is opened once a run and then called for every sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..anatomy import BODY, maisi, region_index
from ..catalog import ModelSpec
from ..errors import CannotRun, Rejected, UsageError
from ..events import OnEvent
from ..geometry import Geometry
from ..plugins import plugins
from ..settings import GenerateSettings
from ..tumors import parse_request
from ..volumes import Mask
from .sizes import parse

if TYPE_CHECKING:
    from ..networks import Loaded


class NoMask(Rejected):
    """A source made no mask that holds what was asked for; another seed may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A mask, and what its record says about where it comes from."""

    mask: Mask
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a mask must hold: every id of `organs` and region of `regions`, and no tumour that is not among `organs`.

    With `compat` entries that list no regions pass for every region; with `any_tumor` no tumour is held against a mask.
    """

    organs: frozenset[int] = frozenset()
    regions: tuple[int, ...] = ()
    compat: bool = False
    any_tumor: bool = False

    def missing(self, ids: Collection[int]) -> list[str]:
        """Return the names of the organs that are not among `ids`."""
        return [maisi().name_of(label) for label in sorted(self.organs) if label not in ids]

    def tumors(self, ids: Collection[int]) -> list[str]:
        """Return the names of the tumours among `ids` that nobody asked for."""
        return [tumor.name for tumor in maisi().tumors() if tumor.id in ids and tumor.id not in self.organs and not self.any_tumor]

    def shows(self, regions: tuple[int, int] | None) -> bool:
        """Say whether every region lies between the top and the bottom of what is shown."""
        if regions is None:
            return self.compat or not self.regions
        return all(regions[0] <= region <= regions[1] for region in self.regions)

    def problem(self, mask: Mask) -> str | None:
        """Say what is wrong with a mask, None when it can be used."""
        ids = mask.ids()
        if missing := self.missing(ids):
            return f"has no {', '.join(missing)} in this volume"
        if tumors := self.tumors(ids):
            return f"has a {', '.join(tumors)}"
        if BODY not in ids:
            return f"has no body envelope (label {BODY})"
        strange = [value for value in ids if value not in maisi()]
        return f"holds ids that MAISI does not have: {', '.join(map(str, strange[:8]))}" if strange else None

    @classmethod
    def of(cls, settings: GenerateSettings, also: Collection[int] = (), *, any_tumor: bool = False) -> Wanted:
        """Return what the settings ask for, and the labels `also`."""
        return cls(organs=frozenset(maisi().id(name) for name in settings.anatomy) | frozenset(also),
                   regions=tuple(region_index(name) for name in settings.regions), compat=settings.compat == "reference",
                   any_tumor=any_tumor)  # fmt: skip


class Source(Protocol):
    """Makes the mask of one sample; the same seed gives the same mask, whatever was made before."""

    def __call__(self, settings: GenerateSettings, geometry: Geometry, seed: int, *, on_event: OnEvent) -> Mask | Made: ...


INDEX = "candidate_masks"  # in the name of the index of a mask database
SIZES = "anatomy_size"  # in the name of the file with the sizes of patients
MASK_PARTS = ("mask_vae", "mask_unet")

# settings that only some sources honour: a source lists those it does as its attribute `honours`
SPECIAL = {"anatomy_size": "--anatomy-size", "tumor": "--tumor", "mask_steps": "--mask-steps", "mask_database": "--mask-database"}


def open_source(
    name: str, settings: GenerateSettings, spec: ModelSpec, *, device: str = "cpu", dtype: str = "fp32",
    typed: frozenset[str] = frozenset(), loaded: Loaded | None = None,
) -> Source:  # fmt: skip
    """Return a registered source, ready for a run; a class is made with the settings and the model.

    `typed` are the settings that the user gave; `loaded` holds networks for sources that load some (those with `parts`), so
    that the rows of a manifest share them. Raises `UsageError` for those among them that the source does not
    honour, and whatever the source finds wrong.
    """
    target: Any = plugins().registry("mask_sources").get(name)
    honours: Collection[str] = getattr(target, "honours", frozenset())
    for key, flag in SPECIAL.items():
        if key not in honours and (getattr(settings, key) if key in ("anatomy_size", "tumor") else key in typed):
            able = [entry.name for entry in plugins().registry("mask_sources") if key in getattr(_target(entry.name), "honours", ())]
            raise UsageError(f"the mask source {name} cannot honour {flag}",
                             hint=f"use --mask-source {' or '.join(able)}, or leave {flag} out")  # fmt: skip
    if settings.cfg_tumor and "cfg_tumor" in typed and not _may_have_tumor(name, honours, settings):
        raise UsageError(f"--cfg-tumor needs masks with a tumour, and none is asked of the mask source {name}",
                         hint="add --tumor liver:15mm, or give a mask that has one:  --mask FILE")  # fmt: skip
    if settings.tumor and "anatomy_size" not in honours and (request := parse_request(settings.tumor)).unit == "relative":
        raise UsageError(f"the mask source {name} knows no relative sizes such as {request}",
                         hint="give the size in mm or ml, or use --mask-source diffusion")  # fmt: skip
    if settings.mode == "paired" and not spec.lesions:
        _require_no_tumor(settings, spec)
    if isinstance(target, type):
        parts: Collection[str] = getattr(target, "parts", ())
        share = {"loaded": loaded} if loaded is not None and parts else {}
        source: Source = target(settings, spec, device=device, dtype=dtype, **share)
        return source
    return target  # type: ignore[no-any-return]


def _require_no_tumor(settings: GenerateSettings, spec: ModelSpec) -> None:
    from .tumors import aim_of

    aim = aim_of(settings, parse(settings.anatomy_size))
    if aim is not None:
        raise UsageError(f"{spec.name} never saw a {maisi().name_of(aim.tumor)}: its image would not show it",
                         hint="use --model rflow-ct, or --mode mask for the label map alone")  # fmt: skip


def _may_have_tumor(name: str, honours: Collection[str], settings: GenerateSettings) -> bool:
    from .tumors import aim_of

    return name == "file" or "tumor" not in honours or aim_of(settings, parse(settings.anatomy_size)) is not None


def choose(settings: GenerateSettings, spec: ModelSpec | None = None) -> tuple[str, str]:
    """Return the name of the source that the settings mean, and why it is that one where `auto` left it open, else "".

    A file that is given comes first. The bundled model takes the phantom. Of a released model: sizes and tumours of
    generated masks need the mask diffusion; otherwise the database, then the mask diffusion, whichever is installed, and
    with neither the phantom.
    """
    if settings.mask_source != "auto":
        return settings.mask_source, ""
    if settings.mask:
        return "file", ""
    if settings.mask_database is not None:
        return "database", ""
    if spec is None or not has_masks(spec):
        return "phantom", ""
    generated = all(any(weight.part == part and spec.weight_path(weight).is_file() for weight in spec.weights) for part in MASK_PARTS)
    stored = database_installed(spec)
    if settings.anatomy_size or (settings.tumor and generated):
        return "diffusion", "masks come from the mask diffusion: it alone makes the sizes that are asked for"
    if stored:
        return "database", f"masks come from the mask database of {spec.name}"
    if generated:
        return "diffusion", f"masks come from the mask diffusion: the mask database of {spec.name} is not installed"
    return "phantom", (f"masks are procedural phantoms: {spec.name} has neither its mask database nor its mask networks installed "
                       f"(maisi models pull {spec.name} --mask-database)")  # fmt: skip


def has_masks(spec: ModelSpec) -> bool:
    """Say whether a model comes with a mask database or with weights of mask networks."""
    listed = {weight.part for weight in spec.weights}
    return data_file(spec, INDEX) is not None or all(part in spec.networks and part in listed for part in MASK_PARTS)


def database_installed(spec: ModelSpec) -> bool:
    """Say whether the model's mask database is here: its index, and masks beside it."""
    index = data_file(spec, INDEX)
    return index is not None and index.is_file() and any(index.parent.glob("all_masks*"))


def _target(name: str) -> Any:
    return plugins().registry("mask_sources").get(name)


def require_parts(spec: ModelSpec, parts: Collection[str]) -> None:
    """Raise `CannotRun` when the weights of a part are not on this machine, `UsageError` when the model lists none."""
    for part in parts:
        weight = next((weight for weight in spec.weights if weight.part == part), None)
        if weight is None:
            raise UsageError(f"model {spec.name} lists no weights for its {part}",
                             hint="train them:  maisi train mask-vae, then mask-dm, which writes a model file")  # fmt: skip
        if not spec.weight_path(weight).is_file():
            raise CannotRun(f"the mask networks of {spec.name} are not installed: {spec.weight_path(weight)} is missing",
                            hint=f"maisi models pull {spec.name}")  # fmt: skip


def data_file(spec: ModelSpec, word: str) -> Path | None:
    """Return where the model's data file lies whose name holds `word` and ends in .json, None when it lists none."""
    for weight in spec.weights:
        if weight.part == "data" and word in Path(weight.path).name and weight.path.endswith(".json"):
            return spec.weight_path(weight)
    return None
