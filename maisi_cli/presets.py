"""Presets: what a body region or a GPU class is best run with, and how well a volume agrees with the training data.

A region preset sets only `[volume]` and `[anatomy]`, a GPU preset only `[execution]`, so any two compose. Found, the
stronger first: the project's `maisi-presets/`, the user's config folder, plugins, and those that come with `maisi`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import UsageError, nearest, unknown
from .geometry import Geometry, format_triple, parse_mm, parse_size

SCHEMA = "maisi.preset/1"
FOLDERS = {"region": "regions", "gpu": "gpus", "train": "train"}
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "region": {
        "volume": ("size", "spacing", "modality", "model"),
        "anatomy": ("regions", "anatomy"),
        "evidence": ("share_percent", "scans", "plane", "source"),
    },
    "gpu": {"execution": ("decoder", "window", "overlap", "dtype", "device", "memory_gib"), "measured": ()},
    "train": {"train": (), "network": (), "data": ()},
}
_PLAIN = ("schema", "kind", "name", "summary", "extends")
MEASURED: dict[str, type | tuple[type, ...]] = {
    "size": list, "window": list, "windows": int, "overlap": (int, float), "splits": int, "peak_gib": (int, float),
    "vae_seconds": (int, float), "ddpm_seconds": (int, float), "rflow_seconds": (int, float), "device": str, "source": str,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One preset: `values` are its tables without `[evidence]`, `evidence` says what its figures rest on."""

    name: str
    kind: str
    summary: str
    values: Mapping[str, Any]
    evidence: Mapping[str, Any]
    path: Path

    @property
    def geometry(self) -> Geometry:
        """The volume of a region preset."""
        volume = self.values["volume"]
        return Geometry(size=parse_size(volume["size"]), spacing=parse_mm(volume["spacing"]))

    @property
    def regions(self) -> tuple[str, ...]:
        """The body regions of a region preset, by the names of `anatomy.REGIONS`."""
        from .anatomy import REGIONS, region_index

        return tuple(REGIONS[region_index(name)] for name in self.values.get("anatomy", {}).get("regions", ()))

    @property
    def modality(self) -> str:
        """The modality of a region preset."""
        return str(self.values["volume"].get("modality", "ct"))


def shipped() -> Path:
    """Return the folder of the presets that come with `maisi`: in the wheel, or at the top of the repository."""
    inside = Path(str(files("maisi_cli") / "presets_data"))
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "presets"


def _sources(kind: str) -> dict[str, Path]:
    """Return every preset file of a kind by name; stronger sources hide weaker ones."""
    from .plugins import plugins

    found = {path.stem: path for path in sorted((shipped() / FOLDERS[kind]).glob("*.toml"))}
    for entry in plugins().registry("presets"):
        path = Path(str(entry.target))
        if _kind_of(path) == kind:
            found[entry.name] = path
    for folder in _own_folders():
        if folder.is_dir():
            found.update({path.stem: path for path in sorted(folder.glob("*.toml")) if _kind_of(path) == kind})
    return found


def _own_folders() -> tuple[Path, Path]:
    """Return the folders of the user's own presets: of this user, and of the project."""
    from platformdirs import user_config_path

    return user_config_path("maisi", appauthor=False) / "presets", Path("maisi-presets")


def _kind_of(path: Path) -> str | None:
    try:
        return str(tomllib.loads(path.read_text("utf-8")).get("kind"))
    except (OSError, ValueError):
        return None


def presets(kind: str) -> list[Preset]:
    """Return every preset of a kind (`region`, `gpu`, `train`), sorted by name."""
    return [_current(path, name) for name, path in sorted(_sources(kind).items())]


def preset(name: str, kind: str) -> Preset:
    """Return a preset by name, or from a `.toml` file. Raises `UsageError` with near matches."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UsageError(f"there is no preset file {name}", hint="check the path; see  maisi presets list")
        found = _current(Path(name))
    else:
        sources = _sources(kind)
        # a file of the user's that is not TOML or of another kind is no source, but it is what is meant
        own = [path for folder in _own_folders() if (path := folder / f"{name}.toml").is_file()]
        if name not in sources and not own:
            raise unknown(f"{kind} preset", name, sources, see=f"maisi presets list --kind {kind}")
        found = _current(sources[name] if name in sources else own[-1], name)
    if found.kind != kind:
        raise UsageError(f"preset {name} is a {found.kind} preset, not a {kind} preset", hint=f"see  maisi presets list --kind {kind}")
    return found


def _current(path: Path, name: str | None = None) -> Preset:
    """Return a preset as its file is now: those that come with `maisi` do not change while it runs, others do."""
    return (read if path.is_relative_to(shipped()) else read.__wrapped__)(path, name=name)


@cache
def read(path: Path, *, name: str | None = None) -> Preset:
    """Read and check one preset file. Raises `UsageError` with the first problem."""
    problems = validate(path)
    if problems:
        raise UsageError(f"{path}: {problems[0]}", hint="see all:  maisi presets validate FILE")
    data = _load(path)
    tables = {key: value for key, value in data.items() if key not in _PLAIN and key != "evidence"}
    return Preset(name=name or data.get("name", path.stem), kind=data["kind"], summary=data.get("summary", ""), values=tables,
                  evidence=data.get("evidence", {}), path=path)  # fmt: skip


def _load(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file and lay it over the preset that it extends, whose evidence is not inherited."""
    data = tomllib.loads(path.read_text("utf-8"))
    if not data.get("extends"):
        return data
    base_name = str(data["extends"])
    if base_name in seen:
        raise UsageError(f"{path} extends itself through {base_name}", hint="remove one extends")
    sources = _sources(str(data.get("kind")))
    if base_name not in sources:
        raise unknown("preset", base_name, sources, see="maisi presets list")
    if sources[base_name].resolve() == path.resolve():
        raise UsageError(f"{path} extends itself", hint=f"name the file otherwise than {base_name}.toml")
    merged = _load(sources[base_name], (*seen, base_name))
    merged.pop("evidence", None)
    for key, value in data.items():
        below = merged.get(key)
        merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def validate(path: Path) -> list[str]:
    """Return every problem of a preset file, with near matches for misspelt keys; an empty list when it is right."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    except ValueError as error:  # not TOML, or not text
        return [f"is not TOML: {error}"]
    problems = []
    if data.get("schema") != SCHEMA:
        problems.append(f'schema is {data.get("schema")!r}, not "{SCHEMA}"')
    kind = data.get("kind")
    if kind not in TABLES:
        return [*problems, f"kind is {kind!r}, not {', '.join(TABLES)}"]
    try:
        data = _load(path)
    except UsageError as error:
        return [*problems, str(error)]
    known = TABLES[kind]
    for key, value in data.items():
        if key in _PLAIN:
            continue
        if key not in known:
            problems.append(_misspelt(key, [*known, *_PLAIN]))
        elif not isinstance(value, Mapping) and key != "measured":
            return [*problems, f"{key} is {value!r}, not a table [{key}]"]
        elif isinstance(value, Mapping) and known[key]:
            problems.extend(
                _misspelt(f"{key}.{inner}", [f"{key}.{each}" for each in known[key]]) for inner in value if inner not in known[key]
            )
    if kind == "region":
        volume = data.get("volume", {})
        for needed in ("size", "spacing"):
            if needed not in volume:
                problems.append(f"[volume] has no {needed}")
        for needed, parse in (("size", parse_size), ("spacing", parse_mm)):
            try:
                parse(volume.get(needed, (1, 1, 1)))
            except UsageError as error:
                problems.append(str(error))
        problems.extend(_unknown_names(volume))
        problems.extend(_unknown_anatomy(data.get("anatomy", {})))
    if kind == "gpu":
        execution = data.get("execution", {})
        memory = execution.get("memory_gib")
        if execution.get("device") != "cpu" and (isinstance(memory, bool) or not isinstance(memory, (int, float)) or memory <= 0):
            problems.append(f"execution.memory_gib is {memory!r}, not the GPU's memory in GiB")
        problems.extend(_wrong_rows(data.get("measured", [])))
    return problems


def _unknown_anatomy(anatomy: Mapping[str, Any]) -> list[str]:
    """Return a problem for each body region and organ that is not known."""
    from .anatomy import maisi, region_index

    problems = []
    for key, find in (("regions", region_index), ("anatomy", maisi().id)):
        names = anatomy.get(key, [])
        if not isinstance(names, list):
            problems.append(f"anatomy.{key} is {names!r}, not a list")
            continue
        for name in names:
            try:
                find(str(name))
            except UsageError as error:
                problems.append(str(error))
    return problems


def _wrong_rows(rows: Any) -> list[str]:
    """Return the problems of the measured rows of a GPU preset."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return ["measured is not a list of tables [[measured]]"]
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        problems.extend(_misspelt(f"measured.{key}", [f"measured.{each}" for each in MEASURED]) for key in row if key not in MEASURED)
        for key, kind in MEASURED.items():
            if key not in row:
                problems.append(f"[[measured]] {number} has no {key}")
            elif not isinstance(row[key], kind) or isinstance(row[key], bool):
                problems.append(f"[[measured]] {number} has {key} {row[key]!r}")
        for key in ("size", "window"):
            try:
                parse_size(row.get(key, (1, 1, 1)))
            except UsageError as error:
                problems.append(f"[[measured]] {number}: {error}")
    return problems


def _unknown_names(volume: Mapping[str, Any]) -> list[str]:
    """Return a problem for a modality or model that is not registered."""
    from . import catalog

    problems = []
    for key, find in (("modality", catalog.modality), ("model", catalog.model)):
        try:
            if key in volume:
                find(str(volume[key]))
        except UsageError as error:
            problems.append(str(error))
    return problems


def _misspelt(key: str, known: Sequence[str]) -> str:
    close = nearest(key, list(known), at_most=1)
    return f"unknown key {key}" + (f", did you mean {close[0]}?" if close else "")


def train_preset(name: str) -> Mapping[str, Any]:
    """Return the `[train]` table of a training preset, by name or from a `.toml` file."""
    return dict(preset(name, "train").values.get("train", {}))


# --- how well a volume agrees with the training data ------------------------------------


def rank(*, regions: Sequence[str] | None = None, modality: str | None = None, size: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return the rows of `recommend-spacing`, the most common training data first.

    With `size` the spacing is the preset's field of view divided by it, and the verdict is that of the result.
    """
    from .anatomy import REGIONS, region_index
    from .catalog import modality as find_modality

    wanted = {REGIONS[region_index(name)] for name in regions} if regions else None
    kind = find_modality(modality) if modality else None
    rows = []
    for each in presets("region"):
        if each.evidence.get("share_percent") is None and each.evidence.get("scans") is None:
            continue  # a preset of one's own says nothing about the training data
        if wanted is not None and set(each.regions) != wanted:
            continue
        if kind is not None and not (agrees(each.modality, kind.name) or _stripped(each, kind.name)):
            continue
        geometry = each.geometry.resized(parse_size(size)) if size else each.geometry
        verdict, reason = judge(geometry, each)
        rows.append({
            "preset": each.name, "modality": each.modality, "region": list(each.regions),
            "share_percent": each.evidence.get("share_percent"), "scans": each.evidence.get("scans"),
            "size": list(geometry.size), "spacing_mm": [round(mm, 4) for mm in geometry.spacing],
            "fov_mm": [round(mm, 1) for mm in geometry.fov_mm], "verdict": verdict, "reason": reason,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (-(row["share_percent"] or 0), -(row["scans"] or 0), row["preset"]))


def agrees(modality: str, wanted: str) -> bool:
    """Say whether a preset's modality is the one that is wanted; `mri` stands for all of MR."""
    from .catalog import modality as find_modality

    return find_modality(modality).name == wanted or (wanted == "mri" and find_modality(modality).kind == "mr")


def _stripped(each: Preset, wanted: str) -> bool:
    """Say whether `wanted` is a preset's modality with the skull removed, which its model was trained on at the same volumes."""
    from .catalog import modality as find_modality
    from .catalog import model

    if wanted != f"{find_modality(each.modality).name}-skull-stripped":
        return False
    return wanted in model(str(each.values["volume"].get("model", "rflow-ct"))).modalities


def judge(geometry: Geometry, against: Preset) -> tuple[str, str]:
    """Return (`ok`, `marginal` or `ood`, the reason): a volume against the median field of view of a preset.

    `ok` within 15 % of the median on each axis and a voxel no more than 4 times as long as it is wide, `marginal` within
    40 % or up to 8 times, else `ood`; a size that the preset's model cannot make is `ood`.
    """
    from .catalog import model

    spec = model(str(against.values["volume"].get("model", "rflow-ct")))
    if not spec.valid_size(geometry.size):
        near = " or ".join(format_triple(g.size) for g in spec.nearest(geometry))
        return "ood", f"{spec.name} makes {near}, not {format_triple(geometry.size)}"
    try:
        spec.check(geometry, modality=against.modality, mode="image", head="head" in against.regions, allow_ood=True)
    except UsageError as error:
        return "ood", error.message
    off = max(abs(mine / median - 1) for mine, median in zip(geometry.fov_mm, against.geometry.fov_mm, strict=True))
    long = max(geometry.spacing) / min(geometry.spacing)
    if off <= 0.15 and long <= 4:
        return "ok", "field of view of the training median" if off < 0.005 else f"field of view within {off:.0%} of the training median"
    if off <= 0.40 and long <= 8:
        if off > 0.15:
            return (
                "marginal",
                f"field of view {off:.0%} off the training median {format_triple(round(f) for f in against.geometry.fov_mm)} mm",
            )
        return "marginal", f"voxels {long:.1f} times as long as wide"
    if long > 8:
        return "ood", f"voxels {long:.1f} times as long as wide"
    return "ood", f"field of view {off:.0%} off the training median {format_triple(round(f) for f in against.geometry.fov_mm)} mm"
