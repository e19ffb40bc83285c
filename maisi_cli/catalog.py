"""The models: networks, schedulers, limits, licences and weight files, each read from one TOML file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UsageError, nearest, unknown
from .geometry import Geometry, Size, format_triple
from .registry import Entry

KINDS = ("autoencoder_kl_maisi", "unet_maisi", "controlnet_maisi", "unet", "slice_net", "resnet50", "squeezenet1_1")
PARTS = ("vae", "unet", "controlnet", "mask_vae", "mask_unet", "features")
MODES = ("paired", "image", "mask")
SCHEDULER_KEYS = ("name", "num_train_timesteps", "base_voxels", "beta_start", "beta_end", "schedule", "clip_sample", "latent_size",
                  "voxel_mm")  # fmt: skip
SCHEDULER_VALUES = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "schedule": "scaled_linear_beta",
    "clip_sample": False,
}
"""What the samplers are made for: a model file may state it, and nothing else."""
HUB_NAME = r"[\w-][\w.+-]*"
LAYOUTS = ("safetensors", "state_dict", "unet", "controlnet", "mask_unet", "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """An imaging modality: the class id that the diffusion model was trained with, and `ct` or `mr`."""

    name: str
    id: int
    kind: str
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """One network: its `kind` names the MONAI class, `arguments` are that class's."""

    name: str
    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file of a model. `part` is a network or `data`; pins are None where the publisher's are not known.

    `source` says where a file is published that no hub has: it is fetched by hand and installed with `pull --from`; `repo`
    then only says where it lies.
    """

    part: str
    path: str
    layout: str = "safetensors"
    repo: str | None = None
    revision: str | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    mib: float | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """The licence of the weights."""

    name: str
    url: str = ""
    commercial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a model can make.

    Either lists of sizes (`size_xy`, `size_z`, x equal to y when `square`), whole `sizes`, or any size that divides by
    `multiple` between `size_min` and `size_max`. Spacings in mm; `fov_xy_min_mm` is refused below, `fov_xy_good_mm` is
    the smallest field of view for the body (not the head) that the training data supports.
    """

    size_xy: tuple[int, ...] = ()
    size_z: tuple[int, ...] = ()
    square: bool = False
    sizes: tuple[Size, ...] = ()
    multiple: int = 16
    size_min: int = 32
    size_max: int = 1024
    spacing_xy_mm: tuple[float, float] = (0.1, 10.0)
    spacing_z_mm: tuple[float, float] = (0.1, 10.0)
    fov_xy_min_mm: float = 0.0
    fov_xy_good_mm: float = 0.0
    pads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that is known about a model before a network is loaded.

    `lesions` says whether masks held tumours and cysts in training: a model that never saw any is shown the organ instead.
    """

    name: str
    summary: str
    modality: str
    modalities: tuple[str, ...]
    modes: tuple[str, ...]
    networks: Mapping[str, NetworkSpec]
    weights: tuple[WeightFile, ...]
    scheduler: Mapping[str, Any]
    mask_scheduler: Mapping[str, Any]
    limits: Limits
    defaults: Mapping[str, Any]
    licence: Licence
    path: Path
    scale_factor: float | None = None
    latent_factor: int = 4
    bundled: bool = False
    max_volume: str = ""
    lesions: bool = True

    @property
    def extracts(self) -> bool:
        """Whether it makes features of images (`maisi fid`) and no images."""
        return "features" in self.networks

    @property
    def latent_channels(self) -> int:
        """The channels of the VAE's latent, which are those that the diffusion model denoises."""
        return int(self.networks["vae"].arguments["latent_channels"])

    @property
    def body_region_inputs(self) -> bool:
        """Whether the diffusion model is told which body regions are in view."""
        return bool(self.networks["unet"].arguments.get("include_top_region_index_input"))

    def weight_path(self, weight: WeightFile) -> Path:
        """Return where a file lies: beside the model file for bundled and own models, else below `home()`.

        Files of the hub lie by repository and revision, so that models share what they have in common; released
        checkpoints lie there as the safetensors file that they are converted to.
        """
        if weight.repo is None:
            return self.path.parent / weight.path
        path = home() / "models" / weight.repo / (weight.revision or "main") / weight.path
        return path if weight.layout in ("safetensors", "data") else path.with_suffix(".safetensors")

    def parts_for(self, mode: str) -> tuple[str, ...]:
        """Return the networks that a mode of `generate` loads when the mask needs none."""
        return {"image": ("vae", "unet"), "paired": ("vae", "unet", "controlnet"), "mask": (), "features": ("features",)}[mode]

    def installed(self, mode: str = "paired") -> bool:
        """Say whether the weights that a mode needs are on this machine."""
        files_of = {weight.part: weight for weight in self.weights}
        return all(part in files_of and self.weight_path(files_of[part]).is_file() for part in self.parts_for(mode))

    def valid_size(self, size: Size) -> bool:
        """Say whether the networks can make this size exactly as it is."""
        limits = self.limits
        if limits.sizes:
            return size in limits.sizes
        if limits.size_xy:
            return (size[0] in limits.size_xy and size[1] in limits.size_xy and size[2] in limits.size_z
                    and (not limits.square or size[0] == size[1]))  # fmt: skip
        return all(n % limits.multiple == 0 and limits.size_min <= n <= limits.size_max for n in size)

    def nearest(self, geometry: Geometry, count: int = 2) -> list[Geometry]:
        """Return the `count` valid sizes nearest to a geometry, at its field of view."""
        return [
            geometry.resized(size) for size in sorted(self._sizes(geometry.size), key=lambda size: _distance(size, geometry.size))[:count]
        ]

    def _sizes(self, wanted: Size) -> list[Size]:
        limits = self.limits
        if limits.sizes:
            return list(limits.sizes)
        if limits.size_xy:
            xy = [(a, b) for a in limits.size_xy for b in limits.size_xy if a == b or not limits.square]
            return [(a, b, c) for a, b in xy for c in limits.size_z]
        m, low, high = limits.multiple, limits.size_min, limits.size_max

        def around(n: int) -> set[int]:
            return {min(max(value, low), high) for value in (n // m * m, -(-n // m) * m)}

        return [(a, b, c) for a in around(wanted[0]) for b in around(wanted[1]) for c in around(wanted[2])]

    def scaled(self, geometry: Geometry) -> Geometry:
        """Return a preset's volume scaled to what this model can make, at constant field of view."""
        if self.valid_size(geometry.size):
            return geometry
        limits = self.limits
        if not limits.sizes and not limits.size_xy:
            x, y, z = (max(limits.size_min, min(limits.size_max, -(-n // limits.multiple) * limits.multiple)) for n in geometry.size)
            return geometry.resized((x, y, z))
        return self.nearest(geometry, 1)[0]

    def shown_on(self, geometry: Geometry) -> Geometry:
        """Return the grid on which the networks are shown a mask that lies on `geometry`; the centre and the axes stay.

        It is `geometry` itself where the model takes it; else, for a model that pads, a larger grid of the same voxels; else
        the nearest size that covers the whole field of view within the model's spacings, never a part of it. Raises
        `UsageError` where there is none.
        """
        limits = self.limits
        if self.valid_size(geometry.size) and not self._spacing_problems(geometry):
            return geometry
        if limits.pads:
            x, y, z = (max(limits.size_min, n) for n in geometry.padded(limits.multiple).size)
            padded = geometry.around((x, y, z))
            if self.valid_size(padded.size) and not self._spacing_problems(padded):
                return padded
        coarsest = (limits.spacing_xy_mm[1], limits.spacing_xy_mm[1], limits.spacing_z_mm[1])
        x, y, z = (max(n, math.ceil(fov / mm - 1e-9)) for n, fov, mm in zip(geometry.size, geometry.fov_mm, coarsest, strict=True))
        sizes = {*self._sizes(geometry.size), *self._sizes((x, y, z))}
        covering = [grid for size in sizes if (grid := self._covering(geometry, size))]
        if not covering:
            raise UsageError(f"model {self.name} has no grid that covers {geometry}", hint="crop the mask, or cut it into parts")
        return min(covering, key=lambda grid: (_distance(grid.size, geometry.size), grid.size))

    def _covering(self, geometry: Geometry, size: Size) -> Geometry | None:
        """Return the grid of this size that covers the field of view as closely as spacings allow, None when it cannot."""
        x, y, z = (extent / n for extent, n in zip(geometry.fov_mm, size, strict=True))
        if self.limits.square:
            x = y = max(x, y)
        (low, high), (low_z, high_z) = self.limits.spacing_xy_mm, self.limits.spacing_z_mm
        if max(x, y) > high or z > high_z:
            return None
        return geometry.regridded(size, (max(x, low), max(y, low), max(z, low_z)))

    def _spacing_problems(self, geometry: Geometry) -> list[str]:
        limits, problems = self.limits, []
        for name, value, (low, high) in (("x", geometry.spacing[0], limits.spacing_xy_mm), ("y", geometry.spacing[1], limits.spacing_xy_mm),
                                         ("z", geometry.spacing[2], limits.spacing_z_mm)):  # fmt: skip
            if not low - 1e-6 <= value <= high + 1e-6:
                problems.append(f"spacing {value:.4g} mm along {name} is outside {low:g}..{high:g} mm")
        if limits.square and abs(geometry.spacing[0] - geometry.spacing[1]) > 1e-4 * geometry.spacing[0]:
            problems.append(f"spacing x {geometry.spacing[0]:.4g} and y {geometry.spacing[1]:.4g} mm differ")
        return problems

    def check(
        self, geometry: Geometry, *, modality: str, mode: str, head: bool = False, allow_ood: bool = False, own_mask: bool = False
    ) -> list[str]:  # fmt: skip
        """Refuse what the model cannot make, and return warnings about what `allow_ood` lets pass.

        Raises `UsageError` naming the nearest valid size, the model that supports the modality, or the flag that allows
        an out-of-distribution field of view; `own_mask` says that a label map brought the grid, which no flag can change.
        """
        self.check_mode(mode)
        self.check_modality(modality)
        limits, size = self.limits, geometry.size
        if not self.valid_size(size):
            near = " or ".join(f"{format_triple(g.size)} (spacing {_mm(g.spacing)} mm)" for g in self.nearest(geometry))
            raise UsageError(
                f"model {self.name} cannot make {format_triple(size)}", hint=f"the nearest sizes at this field of view are {near}"
            )
        problems = self._spacing_problems(geometry)
        if problems:
            raise UsageError(f"model {self.name}: {problems[0]}", hint="see  maisi recommend-spacing")
        fov = min(geometry.fov_mm[:2])
        if fov + 1e-6 < limits.fov_xy_min_mm:
            problems.append(f"field of view {fov:.0f} mm across is below the {limits.fov_xy_min_mm:g} mm that {self.name} was trained on")
        elif not head and fov + 1e-6 < limits.fov_xy_good_mm:
            problems.append(f"field of view {fov:.0f} mm across is below the {limits.fov_xy_good_mm:g} mm of body scans in training")
        if problems and not allow_ood:
            need = limits.fov_xy_min_mm if head else max(limits.fov_xy_min_mm, limits.fov_xy_good_mm)
            if own_mask:
                raise UsageError(problems[0], hint=f"give a mask of {need:g} mm across or more, or --allow-ood")
            wider = max(_up(need / size[0]), _up(need / size[1]))
            raise UsageError(problems[0], hint=f"use --spacing {wider:.4g}x{wider:.4g}x{geometry.spacing[2]:.4g} or larger, or --allow-ood")
        return problems

    def check_mode(self, mode: str) -> None:
        """Refuse a mode that the model has no networks for."""
        if mode not in MODES:
            raise unknown("mode", mode, MODES, see="maisi generate --help")
        self._check_generates()
        if mode not in self.modes:
            why = (
                "it has no ControlNet, and no weights that pair MR images with masks were released"
                if self.modality != "ct"
                else "it has no ControlNet"
            )
            raise UsageError(f"model {self.name} makes {' and '.join(self.modes)} only: {why}", hint=f"use --mode {self.modes[0]}")

    def _check_generates(self) -> None:
        if self.extracts:
            raise UsageError(f"{self.name} makes features of images, and no images", hint=f"use  maisi fid --features {self.name}")

    def check_modality(self, name: str) -> None:
        """Refuse a modality that the weights never saw, naming a model that knows it."""
        self._check_generates()
        wanted = modality(name).name
        if wanted not in self.modalities:
            others = [spec.name for spec in models() if wanted in spec.modalities]
            hint = f"use --model {others[0]}" if others else f"no model knows it; {self.name} knows {', '.join(self.modalities)}"
            raise UsageError(f"the weights of {self.name} were not trained on {wanted}", hint=hint)


def home() -> Path:
    """Return the folder for installed weights: the environment variable `MAISI_HOME`, or this user's data folder."""
    own = os.environ.get("MAISI_HOME")
    if own:
        return Path(own).expanduser()
    from platformdirs import user_data_path

    return user_data_path("maisi", appauthor=False)


def _distance(a: Size, b: Size) -> float:
    return sum(abs(x - y) / max(x, y) for x, y in zip(a, b, strict=True))


def _mm(values: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)


def _up(value: float) -> float:
    """Return a positive number rounded up to the four digits with which it is shown."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit - 1e-9) * unit


@cache
def modalities() -> tuple[Modality, ...]:
    """Return every modality, those of plugins included, in order of id."""
    from .plugins import plugins

    found: list[Modality] = []
    for entry in sorted(plugins().registry("modalities"), key=lambda entry: entry.owner != "maisi"):  # a clash is the plugin's
        row: Any = entry.target
        number = row.get("id") if isinstance(row, Mapping) else None
        if not isinstance(number, int) or not 0 <= number < 128 or row.get("kind") not in ("ct", "mr"):
            raise UsageError(f"modality {entry.name!r} of {entry.owner} needs an id in 0..127 and a kind, ct or mr",
                             hint="correct the plugin")  # fmt: skip
        taken = next((m for m in found if m.id == number or _fold(m.name) == _fold(entry.name)), None)
        if taken:
            raise UsageError(f"modality {entry.name!r} of {entry.owner} has id {number}; {taken.name} with id {taken.id} is there already",
                             hint="choose a free id and another name")  # fmt: skip
        found.append(Modality(name=entry.name, id=number, kind=row["kind"], summary=row.get("summary", entry.summary)))
    return tuple(sorted(found, key=lambda m: m.id))


def modality(name: str) -> Modality:
    """Return a modality by name; `mr-t1`, `mri_t1` and `MR T1` are the same. Raises `UsageError` with near matches."""
    wanted = _fold(name)
    for each in modalities():
        if _fold(each.name) == wanted:
            return each
    raise unknown("modality", name, [each.name for each in modalities()], see="maisi labels list --modalities")


def _fold(name: str) -> str:
    text = name.strip().casefold().replace("_", "-").replace(" ", "-")
    return "mr" + text[3:] if text.startswith("mri") else text


@cache
def models() -> tuple[ModelSpec, ...]:
    """Return every model that is registered and makes images or masks, by name."""
    return tuple(spec for spec in _all() if not spec.extracts)


def extractors() -> tuple[ModelSpec, ...]:
    """Return every registered model that makes features of images, by name."""
    return tuple(spec for spec in _all() if spec.extracts)


def _all() -> tuple[ModelSpec, ...]:
    from .plugins import plugins

    return tuple(_registered(entry) for entry in plugins().registry("models"))


def pull_command(spec: ModelSpec) -> str:
    """Return the command that installs a model: by its name when it is registered, else by its file."""
    registered = any(spec.path == other.path for other in _all())
    return f"maisi models pull {spec.name if registered else spec.path}"


def model(name: str) -> ModelSpec:
    """Return a model by name, or from a `.toml` file of one's own. Raises `UsageError` with near matches."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"there is no model file {name}", hint="check the path; see  maisi models list")
        return read_model.__wrapped__(path)  # as it is now: it may have changed since it was read last
    from .plugins import plugins

    return _registered(plugins().registry("models").entry(name))


def _registered(entry: Entry[Any]) -> ModelSpec:
    spec = read_model(Path(str(entry.target)))
    if spec.name != entry.name:
        raise UsageError(f"{spec.path} describes the model {spec.name!r}, but {entry.owner} registers it as {entry.name!r}",
                         hint="give it one name")  # fmt: skip
    return spec


@cache
def read_model(path: Path) -> ModelSpec:
    """Read and check one model file. Raises `UsageError` that names the key."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not text
        raise UsageError(f"{path} cannot be read: {error}", hint="correct the file") from error
    if data.pop("schema", None) != "maisi.model/1":
        raise UsageError(f"{path} is not a model file", hint='begin it with  schema = "maisi.model/1"')
    networks = {}
    for part, table in _table(data.pop("networks", {}), path, "networks").items():
        if part not in PARTS:
            raise _unknown_key(path, f"networks.{part}", PARTS)
        table = dict(_table(table, path, f"networks.{part}"))
        kind = table.pop("kind", None)
        if kind not in KINDS:
            raise UsageError(f"{path}: networks.{part}.kind is {kind!r}", hint=f"use {', '.join(KINDS)}")
        networks[part] = NetworkSpec(name=part, kind=kind, arguments=table)
    for needed in () if "features" in networks else ("vae", "unet"):
        if needed not in networks:
            raise UsageError(f"{path} has no [networks.{needed}]", hint="a model needs a vae and a unet")
    weights = tuple(_fields(WeightFile, row, path, "weights") for row in data.pop("weights", ()))
    for weight in weights:
        if weight.layout not in LAYOUTS:
            raise UsageError(f"{path}: weights layout {weight.layout!r}", hint=f"use {', '.join(LAYOUTS)}")
        if weight.part not in (*PARTS, "data"):
            raise UsageError(f"{path}: weights part {weight.part!r}", hint=f"use {', '.join(PARTS)} or data")
        if weight.repo is not None:
            _check_address(weight, path)
    limits = _fields(Limits, data.pop("limits", {}), path, "limits")
    if not limits.sizes and not limits.size_xy:
        for key in ("size_min", "size_max"):
            if getattr(limits, key) % limits.multiple:
                raise UsageError(f"{path}: limits.{key} {getattr(limits, key)} does not divide by multiple {limits.multiple}",
                                 hint=f"set {key} to a multiple of it")  # fmt: skip
    licence = _fields(Licence, data.pop("licence", {"name": "not stated"}), path, "licence")
    main = data.get("modality", "ct")
    has_control = "controlnet" in networks
    data.setdefault("modalities", [main])
    data.setdefault("modes", ["features"] if "features" in networks else ["paired", "image"] if has_control else ["image"])
    data.setdefault("scheduler", {"name": "rflow"})
    data.setdefault("mask_scheduler", {})
    for where in ("scheduler", "mask_scheduler"):
        for key, value in _table(data[where], path, where).items():
            if key not in SCHEDULER_KEYS:
                raise _unknown_key(path, f"{where}.{key}", SCHEDULER_KEYS)
            if value != SCHEDULER_VALUES.get(key, value):
                raise UsageError(f"{path}: {where}.{key} is {value!r}, and the samplers are made for {SCHEDULER_VALUES[key]!r}",
                                 hint="register a sampler of your own (maisi plugins list), and leave the key out")  # fmt: skip
    _table(data.setdefault("defaults", {}), path, "defaults")
    data.setdefault("summary", "")
    data.setdefault("name", path.stem)
    data.setdefault("modality", main)
    spec: ModelSpec = _fields(
        ModelSpec, {**data, "networks": networks, "weights": weights, "limits": limits, "licence": licence, "path": path}, path, ""
    )
    for name in spec.modalities:
        modality(name)
    return spec


def _check_address(weight: WeightFile, path: Path) -> None:
    """Refuse a file of the hub whose names would lead out of the folder for weights, and pins of another form."""
    for key, value, form in (("repo", weight.repo, rf"{HUB_NAME}/{HUB_NAME}"), ("revision", weight.revision, HUB_NAME),
                             ("path", weight.path, rf"{HUB_NAME}(/{HUB_NAME})*"), ("sha256", weight.sha256, "[0-9a-f]{64}"),
                             ("git_sha1", weight.git_sha1, "[0-9a-f]{40}")):  # fmt: skip
        if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise UsageError(f"{path}: weights {key} {value!r}", hint="use names as they are on the hub, and hashes in small letters")


def _table(value: Any, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{path}: {where} is {value!r}, not a table", hint=f"write [{where}] above the keys in it")
    return value


def _fields(kind: Any, row: Any, path: Path, where: str) -> Any:
    row = _table(row, path, where)
    known = {field.name for field in dataclasses.fields(kind)}
    for key in row:
        if key not in known:
            raise _unknown_key(path, f"{where}.{key}" if where else key, known)
    values = {key: _frozen(value) for key, value in row.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{path}: [{where or 'model'}] {error}", hint="see  maisi models show nano-ct") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def _unknown_key(path: Path, key: str, known: Any) -> UsageError:
    close = nearest(key.split(".")[-1], list(known))
    return UsageError(f"{path} has an unknown key {key}", hint=f"did you mean {close[0]!r}?" if close else "remove it")
