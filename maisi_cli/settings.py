"""The settings of `generate`: where each value comes from, what it hides, and what it must look like.

Weakest to strongest: built-in default, model, user config, project `maisi.toml`, region preset, GPU preset, environment
(`MAISI_STEPS=20`), `--set key=value`, flag.
"""

from __future__ import annotations

import dataclasses
import os
import re
import string
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown
from .files import stem as file_stem
from .geometry import Geometry, format_triple, parse_mm, parse_size

ENVIRONMENT_PREFIX = "MAISI_"
# environment variables that are not settings of generate
_OTHER_VARIABLES = {"MAISI_HOME", "MAISI_DEBUG", "MAISI_LOAD_PLUGINS", "MAISI_TRACE_PLUGINS", "MAISI_CONFIG", "MAISI_OFFLINE"}
PROJECT_FILE = "maisi.toml"
PRECISIONS = ("fp32", "bf16", "fp16")
MANIFEST_ROW, MASK_FOLDER = "manifest row ", "folder of masks: "
LARGEST_SIZE = 20  # of an anatomy size; the released mask networks saw up to 16.5
LONGEST_NAME = 200  # bytes; file systems take 255, and _image.nii.gz and a temporary ending are added


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """Everything that decides what `generate` makes and how; see `maisi generate --help`.

    `size` in voxels, `spacing` and `fov` in mm; `window` in latent voxels; `seed` None draws one.
    """

    preset: str = "chest-abdomen"
    gpu: str = "auto"
    model: str = "auto"
    mode: str = "paired"
    size: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    fov: tuple[float, float, float] | None = None
    regions: tuple[str, ...] = ()
    anatomy: tuple[str, ...] = ()
    mask: str | None = None
    labels: str = "maisi"
    mask_source: str = "auto"
    mask_database: str | None = None
    anatomy_size: tuple[str, ...] = ()
    tumor: str | None = None
    modality: str = "ct"
    cfg_modality: float = 0.0
    cfg_tumor: float = 0.0
    cfg_mask: float = 0.0
    mask_steps: int = 1000
    scheduler: str = "rflow"
    steps: int = 30
    count: int = 1
    manifest: str | None = None
    seed: int | None = None
    name: str = "{stem}-{model}-seed{seed}-{index:03d}"
    out: str = "."
    format: tuple[str, ...] = ("nifti",)
    preview: bool = True
    keep_latent: bool = False
    force: bool = False
    resume: bool = False
    shard: str | None = None
    decoder: str = "auto"
    sweeps: str = "auto"
    window: tuple[int, int, int] | None = None
    overlap: float = 0.4
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "torch"
    trt: str = "off"
    cuda_graphs: bool = True
    executor: str = "local"
    on_qc_fail: str = "retry"
    retries: int = 3
    compat: str | None = None
    offline: bool = False
    allow_ood: bool = False
    allow_missing_body: bool = False

    def geometry(self) -> Geometry:
        """Return the volume to make. Raises `UsageError` when it is not determined."""
        return Geometry.parse(size=self.size, spacing=self.spacing, fov=self.fov)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A value, where it comes from, and the weaker values that it hides, as (value, origin)."""

    value: Any
    origin: str
    hides: tuple[tuple[Any, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One source of values."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The settings, the origin of each, and notes on choices that were made for the user; `index` is the row of a manifest."""

    settings: GenerateSettings
    origins: Mapping[str, Setting]
    notes: tuple[str, ...] = field(default=())
    index: int | None = None

    def typed(self) -> frozenset[str]:
        """Return the settings that were given for this very run: by flag, `--set` or a manifest's row."""
        return frozenset(key for key, setting in self.origins.items() if _is_typed(setting))


def _is_typed(setting: Setting) -> bool:
    return setting.origin in ("command line", "--set") or setting.origin.startswith((MANIFEST_ROW, MASK_FOLDER))


def _words(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple, set, frozenset)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("it must be names joined by commas, or a list of them")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _regions(value: Any) -> tuple[str, ...]:
    from .anatomy import REGIONS, region_index

    return tuple(dict.fromkeys(REGIONS[region_index(name)] for name in _words(value)))


def _sizes(value: Any) -> tuple[str, ...]:
    """Return sizes as `liver=0.5`, one a name; -1 says that the organ is absent."""
    found = []
    for text in [f"{name}={size}" for name, size in value.items()] if isinstance(value, Mapping) else _words(value):
        name, equals, number = (part.strip() for part in text.partition("="))
        try:
            size = float(number)
        except ValueError:
            size = float("nan")
        if not name or not equals or not (size == -1 or 0 <= size <= LARGEST_SIZE):
            raise ValueError(f"write it like liver=0.5,pancreas=0.3: sizes from 0 to {LARGEST_SIZE}, or -1 for an absent organ")
        found.append(f"{name}={size:.10g}")
    return tuple(found)


def _text(value: Any) -> str:
    if isinstance(value, (bool, list, dict)):
        raise ValueError("it must be text")
    return str(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().casefold()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("use true or false")


def _whole(low: int, high: int | None = None) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("it must be a whole number") from None
        if isinstance(value, bool) or (isinstance(value, float) and value != number):
            raise ValueError("it must be a whole number")
        if number < low or (high is not None and number > high):
            raise ValueError(f"it must lie in {low}..{high}" if high is not None else f"it must be at least {low}")
        return number

    return parse


def _number(low: float, high: float | None = None) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError("it must be a number") from None
        if not low <= number < float("inf") or (high is not None and number >= high):
            raise ValueError(f"it must lie in {low:g}..{high:g}, without {high:g}" if high is not None else f"it must be at least {low:g}")
        return number

    return parse


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        text = str(value)
        if text not in allowed:
            from .errors import nearest

            close = nearest(text, allowed)
            raise ValueError(f"use {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return text

    return parse


def _window(value: Any) -> tuple[int, int, int]:
    try:
        return parse_size(value)
    except UsageError as error:
        raise UsageError(error.message.replace("size", "window", 1), hint="write it like 64x64x48") from error


def _device(value: Any) -> str:
    text = str(value)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise ValueError("use auto, cpu, cuda, cuda:1 or mps")
    return text


def _formats(value: Any) -> tuple[str, ...]:
    found = _words(value)
    if not found:
        raise ValueError("name at least one format, such as nifti")
    return found


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "mode": _one_of("paired", "image", "mask"), "size": parse_size, "spacing": parse_mm,
    "fov": lambda value: parse_mm(value, "fov"), "regions": _regions, "anatomy": _words, "cfg_modality": _number(0),
    "cfg_tumor": _number(0), "cfg_mask": _number(0), "anatomy_size": _sizes, "mask_steps": _whole(1, 1000),
    "steps": _whole(1, 1000), "count": _whole(1), "seed": _whole(0, 2**63 - 1), "format": _formats, "preview": _truth,
    "keep_latent": _truth, "force": _truth, "resume": _truth, "decoder": _one_of("auto", "exact", "window"),
    "sweeps": _one_of("auto", "store", "half", "recompute"),
    "window": _window, "overlap": _number(0, 1), "device": _device, "cuda_graphs": _truth, "dtype": _one_of("auto", *PRECISIONS),
    "engine": _one_of("torch", "openvino", "aoti", "trt"), "trt": _one_of("require", "prefer", "off"),
    "on_qc_fail": _one_of("retry", "drop", "keep"), "retries": _whole(0, 100), "compat": _one_of("reference"),
    "offline": _truth, "allow_ood": _truth, "allow_missing_body": _truth,
}  # fmt: skip
KEYS = tuple(each.name for each in dataclasses.fields(GenerateSettings))
_TABLES = ("volume", "anatomy", "execution", "generate", "sampling", "output")


def parse_value(key: str, value: Any, origin: str) -> Any:
    """Check and convert one value. Raises `UsageError` that names the key and its origin."""
    if key not in KEYS:
        error = unknown("setting", key, [*KEYS, *_TABLES], see="maisi generate --help")
        raise UsageError(f"{error.message} (from {origin})", hint=error.hint)
    if value is None:
        return None
    try:
        return _PARSERS.get(key, _text)(value)
    except UsageError as error:
        raise UsageError(f"{error.message} (from {origin})", hint=error.hint) from error
    except (TypeError, ValueError) as error:
        flag = "--" + key.replace("_", "-")
        raise UsageError(f"{flag} {value!r} ({origin}) is not valid", hint=str(error)) from error


def flatten(tables: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings of a TOML document: keys at its top level or in its tables."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if key in _TABLES:
            if not isinstance(value, Mapping):
                raise UsageError(f"{key} is {value!r}, not a table (from {origin})", hint=f"write [{key}] above the keys in it")
            flat.update(value)
        elif key not in ("schema",):
            flat[key] = value
    return {key.replace("-", "_"): parse_value(key.replace("-", "_"), value, origin) for key, value in flat.items()}


def read_config(path: Path, origin: str) -> Layer | None:
    """Return the layer of a config file, or None when there is none. Raises `UsageError` for a wrong one."""
    if not path.is_file():
        return None
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not text
        raise UsageError(f"{path} cannot be read: {error}", hint="correct the file") from error
    return Layer(origin=origin, values=flatten(data, str(path)))


def parse_assignments(texts: Sequence[str], tables: Sequence[str] = _TABLES) -> dict[str, Any]:
    """Parse `--set key=value` texts; values are TOML, bare words are strings. The prefix of one of `tables` may stand.

    Raises `UsageError` for a text without a value and for a table that is not known.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, raw = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} has no value", hint="write it like --set steps=20")
        table, dot, name = key.strip().rpartition(".")
        if dot and table not in tables:
            raise UsageError(
                f"--set {text!r}: there is no table {table!r}", hint=f"write {name}={raw} alone; tables are {', '.join(tables)}"
            )
        values[name.replace("-", "_")] = toml_value(raw.strip())
    return values


def toml_value(raw: str) -> Any:
    """Return a TOML value; what is not valid TOML is taken as a string."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def environment_layer(environment: Mapping[str, str] | None = None) -> Layer:
    """Return the layer of `MAISI_*` variables. Raises `UsageError` for one that is no setting."""
    values: dict[str, Any] = {}
    for variable, raw in (os.environ if environment is None else environment).items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES - {"MAISI_OFFLINE"}:
            continue
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key not in KEYS:
            raise unknown("environment setting", variable, [ENVIRONMENT_PREFIX + each.upper() for each in KEYS],
                          see="maisi generate --help")  # fmt: skip
        values[key] = parse_value(key, raw, f"environment {variable}")
    return Layer(origin="environment", values=values)


def config_path() -> Path:
    """Return the user's config file: `MAISI_CONFIG`, or `config.toml` in this user's config folder."""
    own = os.environ.get("MAISI_CONFIG")
    if own:
        return Path(own)
    from platformdirs import user_config_path

    return user_config_path("maisi", appauthor=False) / "config.toml"


def resolve(
    flags: Mapping[str, Any] | None = None, *, assignments: Sequence[str] = (), config: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None, folder: Path | None = None, row: Layer | None = None, index: int | None = None,
) -> Resolved:  # fmt: skip
    """Return the settings of one run from all layers.

    `flags` are keyword values (None means not given); `config` are the settings of a record that is run again, as strong
    as flags but below them; `row` are those of row `index` of a manifest, stronger than flags, which all rows share. Raises
    `UsageError` for whatever is wrong, before anything heavy is loaded.
    """
    from . import presets

    given = {key: parse_value(key, value, "command line") for key, value in (flags or {}).items() if value is not None}
    sets = {key: parse_value(key, value, "--set") for key, value in parse_assignments(assignments).items()}
    repeated = {key: parse_value(key, value, "record") for key, value in (config or {}).items() if value is not None}
    top = [Layer(origin="record", values=repeated), Layer(origin="--set", values=sets), Layer(origin="command line", values=given)]
    if row is not None:
        top.append(Layer(origin=row.origin, values={key: parse_value(key, value, row.origin) for key, value in row.values.items()}))
    bottom = [
        layer for layer in (read_config(config_path(), "user config"), read_config((folder or Path()) / PROJECT_FILE, PROJECT_FILE))
        if layer
    ]  # fmt: skip
    middle = environment_layer(environment)
    defaults = Layer(origin="default", values={key.name: key.default for key in dataclasses.fields(GenerateSettings)})

    def pick(key: str, layers: Sequence[Layer]) -> Any:
        return next((layer.values[key] for layer in reversed(layers) if key in layer.values), None)

    outer = [defaults, *bottom, middle, *top]
    own_mask = pick("mask", outer) is not None
    region = presets.preset(str(pick("preset", outer)), "region")
    region_layer = Layer(origin=f"preset {region.name}", values=_preset_values(region))
    if own_mask:  # the mask brings its grid: a preset only gives what the mask does not know
        region_layer = dataclasses.replace(
            region_layer, values={k: v for k, v in region_layer.values.items() if k not in ("size", "spacing")}
        )
        for key in ("size", "spacing", "fov"):
            if pick(key, [*bottom, middle, *top]) is not None:
                raise UsageError(
                    f"--{key} and --mask exclude each other: the image is made on the mask's own grid", hint=f"leave --{key} out"
                )
    gpu = presets.preset(str(pick("gpu", outer)), "gpu") if pick("gpu", outer) != "auto" else None
    gpu_layer = Layer(origin=f"preset {gpu.name}" if gpu else "gpu auto", values=_preset_values(gpu) if gpu else {})
    layers = [defaults, *bottom, region_layer, gpu_layer, middle, *top]

    notes: list[str] = []
    wanted = str(pick("model", [*bottom, middle, *top]) or "auto")
    spec, origin = _choose_model(wanted, region, str(pick("mode", layers)), notes)
    model_layer = Layer(origin=f"model {spec.name}", values=_model_defaults(spec))
    layers.insert(1, model_layer)
    if wanted != "auto":
        origin = next(layer.origin for layer in reversed([*bottom, middle, *top]) if "model" in layer.values)
    # what was chosen is the strongest; of the others it hides those that name a model
    layers = [dataclasses.replace(each, values={k: v for k, v in each.values.items()
                                                if k != "model" or (v != "auto" and each.origin != origin)})
              for each in layers]  # fmt: skip
    layers.append(Layer(origin=origin, values={"model": spec.name if not wanted.endswith(".toml") else wanted}))

    origins: dict[str, Setting] = {}
    for key in KEYS:
        stack = [(layer.values[key], layer.origin) for layer in layers if key in layer.values and layer.values[key] is not None]
        if not stack:
            origins[key] = Setting(value=None, origin="default")
            continue
        value, where = stack[-1]
        hidden = tuple((v, o) for v, o in reversed(stack[:-1]) if o != "default" or all(v != each for each, _ in stack[1:]))
        origins[key] = Setting(value=value, origin=where, hides=hidden)
    if not own_mask:
        _settle_geometry(origins, [region_layer.origin], [layer.origin for layer in layers], spec, notes)
    _check_names(origins, spec)
    _check_together(origins)
    settings = GenerateSettings(**{key: setting.value for key, setting in origins.items()})
    return Resolved(settings=settings, origins=origins, notes=tuple(notes), index=index)


def _preset_values(preset: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for table in preset.values.values():
        if isinstance(table, Mapping):
            flat.update(table)
    return {key: parse_value(key, value, f"preset {preset.name}") for key, value in flat.items() if key in KEYS}


def _model_defaults(spec: Any) -> dict[str, Any]:
    values = dict(spec.defaults)
    values.setdefault("scheduler", str(spec.scheduler.get("name", "rflow")))
    values.setdefault("modality", spec.modality)
    return {key: parse_value(key, value, f"model {spec.name}") for key, value in values.items()}


def _choose_model(wanted: str, region: Any, mode: str, notes: list[str]) -> tuple[Any, str]:
    """Return the model and where the choice comes from; `auto` takes the preset's model when it is installed."""
    from . import catalog

    if wanted != "auto":
        return catalog.model(wanted), "command line"
    preferred = str(region.values.get("volume", {}).get("model", "rflow-ct"))
    spec = catalog.model(preferred)
    if spec.installed(mode if mode in spec.modes and mode != "mask" else spec.modes[0]):
        return spec, f"preset {region.name}"
    small = catalog.model("nano-ct")
    if spec.modality != small.modality:
        return spec, f"preset {region.name}"  # no other model makes it: what is missing is said when it is needed
    notes.append(f"model nano-ct is used: {preferred} is not installed (maisi models pull {preferred})")
    return small, "auto"


def require_weights(spec: Any, mode: str) -> None:
    """Raise `CannotRun`, with what to do about it, when the weights that a mode needs are not on this machine."""
    from .catalog import pull_command
    from .errors import CannotRun

    if spec.installed(mode):
        return
    missing = [spec.weight_path(weight) for weight in spec.weights if weight.part in spec.parts_for(mode)]
    path = next((each for each in missing if not each.is_file()), spec.path)
    pulled = any(weight.repo is not None for weight in spec.weights)
    if pulled:
        hint = pull_command(spec)
    elif spec.bundled:
        hint = "its weights come with maisi: install maisi again"
    else:
        hint = f"put the file there, or correct the [[weights]] of {spec.path}"
    raise CannotRun(f"model {spec.name} is not installed: {path} is missing", hint=hint)


def _settle_geometry(
    origins: dict[str, Setting], preset_origins: Sequence[str], order: Sequence[str], spec: Any, notes: list[str]
) -> None:  # fmt: skip
    """Leave exactly two of size, spacing and fov: what was typed wins; a preset's field of view is kept.

    Of three that were typed the one from the weakest layer of `order` gives way; three from one place must agree. A size
    from a preset is scaled to the model's limits at constant field of view; a typed size never is.
    """
    names = ("size", "spacing", "fov")
    above = max(order.index(origin) for origin in preset_origins)
    typed = [name for name in names if origins[name].value is not None and order.index(origins[name].origin) > above]
    base_size, base_spacing = (_layer_value(origins[name], preset_origins) for name in ("size", "spacing"))
    if len(typed) == 3:
        ranks = {name: order.index(origins[name].origin) for name in names}
        weakest = min(names, key=lambda name: ranks[name])
        if [*ranks.values()].count(ranks[weakest]) == 1:
            typed.remove(weakest)
    if base_size is None or base_spacing is None:
        if len(typed) < 2:
            raise UsageError("the volume is not determined", hint="give two of --size, --spacing and --fov, or a --preset")
        base = None
    else:
        base = Geometry(size=base_size, spacing=base_spacing)
    if len(typed) >= 2:
        values = {name: origins[name].value if name in typed else None for name in names}
        made = Geometry.parse(**values)
    elif typed == ["size"]:
        made = Geometry.parse(size=origins["size"].value, fov=base.fov_mm)  # type: ignore[union-attr]
    elif typed == ["spacing"]:
        made = Geometry.parse(size=spec.scaled(base).size, spacing=origins["spacing"].value)
    elif typed == ["fov"]:
        made = Geometry.parse(size=spec.scaled(base).size, fov=origins["fov"].value)
    else:
        assert base is not None
        made = spec.scaled(base)
        if made.size != base.size:
            notes.append(f"volume scaled to {spec.name}: {made}, from {format_triple(base.size)}")
            origins["size"] = Setting(value=made.size, origin=f"model {spec.name}", hides=((base.size, preset_origins[0]),))
            origins["spacing"] = Setting(value=made.spacing, origin=f"model {spec.name}", hides=((base.spacing, preset_origins[0]),))
    for name, value in (("size", made.size), ("spacing", made.spacing)):
        if name not in typed and origins[name].value != value:
            origins[name] = Setting(
                value=value, origin="derived", hides=((origins[name].value, origins[name].origin),) if origins[name].value else ()
            )
    if "fov" in typed:
        origins["fov"] = dataclasses.replace(origins["fov"], value=made.fov_mm)
    else:
        hidden = origins["fov"]
        origins["fov"] = Setting(value=made.fov_mm, origin="derived", hides=((hidden.value, hidden.origin),) if hidden.value else ())


def _layer_value(setting: Setting, preset_origins: Sequence[str]) -> Any:
    for value, origin in ((setting.value, setting.origin), *setting.hides):
        if origin in preset_origins:
            return value
    return None


def _check_names(origins: Mapping[str, Setting], spec: Any) -> None:
    """Check what is a name of something registered, and what the model must know."""
    from . import catalog
    from .anatomy import maisi, remap_table
    from .plugins import plugins
    from .tumors import parse_request

    registered = plugins()
    registered.registry("samplers").entry(str(origins["scheduler"].value))
    registered.registry("executors").entry(str(origins["executor"].value))
    for name in origins["format"].value:
        registered.registry("formats").entry(name)
    if origins["mask_source"].value != "auto":
        registered.registry("mask_sources").entry(str(origins["mask_source"].value))
    for name in origins["anatomy"].value:
        maisi().id(name)
    if origins["tumor"].value:
        parse_request(str(origins["tumor"].value))
    shard = origins["shard"].value
    if shard is not None:
        parse_shard(str(shard))
    if origins["labels"].value != "maisi":
        remap_table(str(origins["labels"].value))
    kind = catalog.modality(str(origins["modality"].value))
    spec.check_modality(kind.name)
    spec.check_mode(str(origins["mode"].value))
    sample_id(origins, spec, 0)
    if origins["count"].value > 1 and sample_id(origins, spec, 0) == sample_id(origins, spec, 1):
        raise UsageError(
            f"--name {origins['name'].value!r} gives all {origins['count'].value} samples one name", hint="put {index} into it"
        )


def _check_together(origins: dict[str, Setting]) -> None:
    """Refuse values that would go unused or contradict one another; a window that is typed asks for the window decoder."""

    def typed(key: str) -> bool:
        return _is_typed(origins[key])

    def value(key: str) -> Any:
        return origins[key].value

    if value("mask") is None:
        for key in ("labels", "allow_missing_body"):
            if typed(key):
                raise UsageError(f"--{key.replace('_', '-')} speaks of the label map of --mask, and there is none", hint="add --mask FILE")
        if value("mask_source") == "file" and value("mode") != "image":
            raise UsageError("--mask-source file needs a mask", hint="add --mask FILE")
    else:
        if value("mode") == "image":
            raise UsageError(
                "--mode image makes an image without a mask, and --mask gives one", hint="use --mode paired, or leave --mask out"
            )
        if value("mask_source") not in ("auto", "file"):
            raise UsageError(f"--mask-source {value('mask_source')} and --mask exclude each other", hint="leave one out")
    if value("mode") == "image" and typed("mask_source") and value("mask_source") != "auto":
        raise UsageError("--mode image makes an image without a mask", hint="use --mode paired, or leave --mask-source out")
    if value("mode") == "mask" and typed("keep_latent") and value("keep_latent"):
        raise UsageError("--mode mask makes no latent that could be kept", hint="use --mode paired, or leave --keep-latent out")
    if value("on_qc_fail") != "retry" and typed("retries") and value("retries"):
        raise UsageError(
            f"--retries {value('retries')} would go unused with --on-qc-fail {value('on_qc_fail')}",
            hint="use --on-qc-fail retry, or leave --retries out",
        )
    if value("mode") == "image" and typed("anatomy") and value("anatomy"):
        raise UsageError("--mode image makes no mask that could hold --anatomy", hint="use --mode paired, or leave --anatomy out")
    for key, flag in (("anatomy_size", "--anatomy-size"), ("tumor", "--tumor"), ("mask_database", "--mask-database")):
        if value(key) and value("mode") == "image":
            raise UsageError(f"--mode image makes no mask, and {flag} speaks of one", hint=f"use --mode paired, or leave {flag} out")
        if value(key) and value("mask") is not None and key != "tumor":
            raise UsageError(f"{flag} and --mask exclude each other: the mask is what it is", hint=f"leave {flag} out")
    if value("mode") == "image" and typed("mask_steps"):
        raise UsageError("--mode image makes no mask, and --mask-steps speaks of one", hint="use --mode paired, or leave --mask-steps out")
    if value("cfg_tumor") and value("cfg_modality"):
        raise UsageError("--cfg-tumor and --cfg-modality exclude each other", hint="set one of them to 0")
    if value("cfg_mask") and typed("cfg_mask") and value("mode") != "paired":
        raise UsageError(f"--cfg-mask guides an image toward its mask, and --mode {value('mode')} has not both",
                         hint="use --mode paired, or leave --cfg-mask out")  # fmt: skip
    for key in ("cfg_modality", "cfg_tumor"):
        if value(key) and value("cfg_mask"):
            flag = "--" + key.replace("_", "-")
            if typed("cfg_mask"):
                raise UsageError(f"--cfg-mask and {flag} exclude each other", hint="set one of them to 0")
            hidden = origins["cfg_mask"]  # the model's own gives way to a guidance that was asked for
            origins["cfg_mask"] = Setting(value=0.0, origin="derived", hides=((hidden.value, hidden.origin),))
    if value("cfg_tumor") and typed("cfg_tumor") and value("mode") != "paired":
        raise UsageError(f"--cfg-tumor compares two masks, and --mode {value('mode')} makes no image for one",
                         hint="use --mode paired, or leave --cfg-tumor out")  # fmt: skip
    if value("trt") != "off" and (value("engine") not in ("torch", "trt") or (typed("engine") and value("engine") == "torch")):
        raise UsageError(f"--engine {value('engine')} and --trt {value('trt')} exclude each other", hint="leave one of them out")
    if value("engine") == "trt" and typed("trt") and value("trt") == "off":
        raise UsageError("--engine trt and --trt off exclude each other", hint="leave one of them out")
    own = ("command line", "--set", "environment", PROJECT_FILE, "user config")
    overlap = typed("overlap") or (origins["overlap"].origin in own and value("window") is not None)
    if value("decoder") == "auto" and (origins["window"].origin in own or overlap):
        origins["decoder"] = Setting(value="window", origin="derived", hides=(("auto", origins["decoder"].origin),))
    if value("decoder") == "window" and value("window") is None:
        raise UsageError("the window decoder needs a window in latent voxels", hint="add --window 64x64x48")
    for key in ("window", "overlap"):
        if value("decoder") == "exact" and typed(key):
            raise UsageError(
                f"--{key} is of the window decoder, and the decoder is exact", hint=f"add --decoder window, or leave --{key} out"
            )
    if value("shard") is not None and value("seed") is None:
        raise UsageError("--shard needs the seed that all shards of the run share", hint="add --seed S")


def sample_id(values: Any, spec: Any, index: int) -> str:
    """Return the name of sample `index` that the files of a run begin with.

    `values` are `GenerateSettings`, or settings by name. Raises `UsageError` for a template that names something else, and
    for a name that is no file name.
    """

    def value(key: str) -> Any:
        return values[key].value if isinstance(values, Mapping) else getattr(values, key)

    template = str(value("name"))
    stem = str(value("preset")) if value("mask") is None else file_stem(Path(str(value("mask"))))
    seed = value("seed") if value("seed") is not None else 0
    words = {"stem": Path(stem).stem if stem.endswith(".toml") else stem, "preset": Path(str(value("preset"))).stem, "index": index,
             "seed": seed, "model": spec.name, "mode": value("mode")}  # fmt: skip
    known = ", ".join(map("{{{}}}".format, words))
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        strange = next((name for name in fields if name not in words), None)
        if strange is not None:
            raise ValueError(f"there is no {{{strange}}}")
        name = template.format(**words)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"--name {template!r} cannot be filled in: {error}", hint=f"use {known}") from error
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise UsageError(f"--name makes the file name {name!r}", hint="leave slashes and leading dots out; folders go into --out")
    if len(name.encode()) > LONGEST_NAME:
        raise UsageError(f"--name makes a file name of {len(name.encode())} bytes", hint=f"keep it below {LONGEST_NAME}")
    return name


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `i/n`, 1 <= i <= n. Raises `UsageError`."""
    left, slash, right = text.partition("/")
    if not slash or not left.isdecimal() or not right.isdecimal() or not 1 <= int(left) <= int(right):
        raise UsageError(f"--shard {text!r} is not a share of the samples", hint="write it like --shard 3/16")
    return int(left), int(right)


def explain(resolved: Resolved, *, everything: bool = False) -> list[tuple[str, str, str]]:
    """Return rows (key, value, origin and what it hides) for `--dry-run`; without `everything`, defaults are left out."""
    rows = []
    for key in KEYS:
        setting = resolved.origins[key]
        if setting.value is None or (setting.origin == "default" and not setting.hides and not everything):
            continue
        hides = "; ".join(f"{show(value)} ({origin})" for value, origin in setting.hides if value is not None)
        rows.append((key, show(setting.value), setting.origin + (f"   hides {hides}" if hides else "")))
    return rows


def show(value: Any) -> str:
    """Return a value as it would be typed."""
    if isinstance(value, tuple) and value and all(isinstance(each, (int, float)) for each in value):
        return format_triple(round(each, 5) if isinstance(each, float) else each for each in value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
