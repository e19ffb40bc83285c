"""The label vocabulary: ids, names, groups, regions, colours, lesions and their hosts, and remaps between vocabularies.

A label file of `maisi` always holds ids of this vocabulary: 1..132 as the released networks know them, 200 for every
voxel of the body that has no label of its own, 0 outside the body. 133..199 and 201..255 are free for new classes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown
from .registry import Entry

BODY = 200
REGIONS = ("head", "chest", "abdomen", "lower")
TUMOR_GROUP = "tumor"
OWN_FILE = "labels.toml"
"""Labels of one's own, in the folder where a command runs."""
FREE = "new labels take a free id in 133..199 or 201..255, or that of a dummy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One class: `raw` is its channel in the mask autoencoder, `host` the label of the organ that a lesion lies in."""

    id: int
    name: str
    group: str
    regions: tuple[str, ...] = ()
    color: tuple[int, int, int] = (200, 200, 200)
    raw: int | None = None
    host: int | None = None
    owner: str = "maisi"

    @property
    def side(self) -> str | None:
        """`left`, `right` or None, in the patient's sense."""
        first = self.name.split()[0]
        return first if first in ("left", "right") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A set of labels that belong together, looked up by name or number."""

    name: str
    labels: tuple[Label, ...]
    aliases: Mapping[str, str]
    _by_id: Mapping[int, Label] = field(init=False, repr=False, compare=False)
    _by_name: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {label.id: label for label in self.labels})
        object.__setattr__(self, "_by_name", {fold(label.name): label.id for label in self.labels})

    def id(self, name: str | int) -> int:
        """Return the id of a label; case, hyphens and underscores do not matter, a number is taken as it is.

        Raises `UsageError` with near matches.
        """
        text = str(name).strip()
        if text.isdecimal():
            if self.get(int(text)) is None:
                raise UsageError(f"there is no label {text} in the vocabulary {self.name}", hint="see  maisi labels list")
            return int(text)
        wanted = fold(text)
        wanted = fold(self.aliases.get(wanted, wanted))
        found = self._by_name.get(wanted)
        if found is None:
            raise unknown("label", text, [label.name for label in self.labels if label.group != "dummy"],
                          see="maisi labels list")  # fmt: skip
        return found

    def get(self, label_id: int) -> Label | None:
        """Return the label with this id, or None."""
        return self._by_id.get(label_id)

    def name_of(self, label_id: int) -> str:
        """Return the name of an id; ids that are not in the vocabulary are called `label N`."""
        label = self.get(label_id)
        return label.name if label else ("background" if label_id == 0 else f"label {label_id}")

    def ids(self, group: str | None = None) -> tuple[int, ...]:
        """Return all ids, or those of one group, in order."""
        return tuple(label.id for label in self.labels if group in (None, label.group))

    def tumors(self) -> tuple[Label, ...]:
        """Return the tumour classes."""
        return tuple(label for label in self.labels if label.group == TUMOR_GROUP)

    def __contains__(self, label_id: object) -> bool:
        return label_id in self._by_id


def fold(name: str) -> str:
    """Return a name in the form in which names are compared."""
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((files("maisi_cli") / "data" / "anatomy.toml").read_text("utf-8"))


@cache
def maisi() -> Vocabulary:
    """Return the MAISI vocabulary: 132 classes, the body envelope 200, the labels that plugins added, and those of `OWN_FILE`."""
    from .plugins import plugins

    data = _data()
    names = {row["name"]: row["id"] for row in data["label"]}
    labels = {row["id"]: _label(row, names, "maisi") for row in data["label"]}
    for entry in plugins().registry("labels"):
        target = entry.target
        if not isinstance(target, Mapping) or "pairs" in target:
            continue  # a label set
        if "id" not in target:
            raise UsageError(f"label {entry.name!r} of {entry.owner} has neither an id nor pairs", hint="correct the plugin")
        _add(labels, _label({"group": "plugin", **target, "name": entry.name}, names, entry.owner))
    for row in own_labels(Path(OWN_FILE)):
        _add(labels, _label({"group": "own", **row}, names, OWN_FILE))
    aliases = {fold(key): value for key, value in data["aliases"].items()}
    return Vocabulary(name="maisi", labels=tuple(sorted(labels.values(), key=lambda label: label.id)), aliases=aliases)


def _add(labels: dict[int, Label], label: Label) -> None:
    """Add a label to a vocabulary: at a free id, or in the place of a dummy. Raises `UsageError` for ids and names that are taken."""
    old = labels.get(label.id)
    if old is not None and old.group != "dummy":
        raise UsageError(f"label {label.id} of {label.owner} is already {old.name!r}", hint=FREE)
    if old is None and (not 133 <= label.id <= 255 or label.id == BODY):
        raise UsageError(f"label {label.name!r} of {label.owner} has id {label.id}", hint=FREE)
    other = next((each for each in labels.values() if fold(each.name) == fold(label.name)), None)
    if other is not None:
        raise UsageError(f"label {label.name!r} of {label.owner} has the name of label {other.id} of {other.owner}",
                         hint="choose another name")  # fmt: skip
    labels[label.id] = replace(label, raw=old.raw if old else label.raw)


def own_labels(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of one's own labels, `[[label]]` with name, id, group, host and color; none where there is no file.

    Raises `UsageError` for a file that is none.
    """
    if not path.is_file():
        return []
    try:
        rows = tomllib.loads(path.read_text("utf-8"))["label"]
        for row in rows:
            strange = set(row) - {"name", "id", "group", "host", "color", "regions"}
            if strange or not isinstance(row["name"], str) or not isinstance(row["id"], int) or isinstance(row["id"], bool):
                raise ValueError(f"a label has {', '.join(sorted(strange)) or 'no name or id'}")
        return list(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a file of labels: {error}", hint="write it with  maisi labels add") from error


def _label(row: Mapping[str, Any], names: Mapping[str, int], owner: str) -> Label:
    host = row.get("host")
    if isinstance(host, str) and host not in names:
        raise unknown(f"host of {row['name']!r} ({owner})", host, names, see="maisi labels list")
    if not isinstance(row["id"], int):
        raise UsageError(f"label {row['name']!r} of {owner} has id {row['id']!r}", hint=FREE)
    return Label(
        id=row["id"], name=row["name"], group=row["group"], regions=tuple(row.get("regions", ())),
        color=tuple(row.get("color", (220, 90, 220))), raw=row.get("raw"),
        host=names[host] if isinstance(host, str) else host, owner=owner,
    )  # fmt: skip


def region_index(name: str) -> int:
    """Return the index of a body region, head 0 to lower 3; `thorax` and `pelvis` are understood."""
    text = name.strip().casefold()
    text = _data()["region_aliases"].get(text, text)
    if text not in REGIONS:
        raise UsageError(f"there is no body region {name!r}", hint=f"use {', '.join(REGIONS)}")
    return REGIONS.index(text)


def regions_of(ids: Collection[int]) -> tuple[int, int] | None:
    """Return the top and bottom region index that the labels of a mask show, or None without a marker organ."""
    present = [index for index, region in enumerate(REGIONS) if not set(_data()["region_markers"][region]).isdisjoint(ids)]
    return (present[0], present[-1]) if present else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Remap:
    """A table from the ids of one vocabulary to another; `names` are the source's names."""

    source: str
    target: str
    summary: str
    names: Mapping[int, str]
    pairs: Mapping[int, int]

    def table(self, *, other: int = 0) -> tuple[int, ...]:
        """Return a look-up table of 256 entries; ids that the remap does not know become `other`, 0 stays 0."""
        return tuple(0 if value == 0 else self.pairs.get(value, other) for value in range(256))

    def unmapped(self, present: Iterable[int]) -> dict[int, str]:
        """Return those of the ids `present` that have no partner, with their names."""
        return {value: self.names.get(value, f"id {value}") for value in sorted(present)
                if value != 0 and value not in self.pairs}  # fmt: skip

    def has_body(self, present: Iterable[int]) -> bool:
        """Say whether the body envelope is among the ids `present`: one that maps to 200, or 200 itself where it means nothing else."""
        return any(self.pairs.get(value, 0 if value in self.names else value) == BODY for value in present)

    def many_to_one(self) -> dict[int, tuple[int, ...]]:
        """Return target ids that several source ids share: these cannot be mapped back."""
        back: dict[int, list[int]] = {}
        for source, target in self.pairs.items():
            back.setdefault(target, []).append(source)
        return {target: tuple(sources) for target, sources in back.items() if len(sources) > 1}

    def inverse(self) -> Remap:
        """Return the remap the other way; where several ids share a target, the lowest one is taken."""
        vocabulary = maisi()
        pairs: dict[int, int] = {}
        for source, target in sorted(self.pairs.items()):
            pairs.setdefault(target, source)
        names = {label.id: label.name for label in vocabulary.labels}  # of those without a partner too
        return Remap(source=self.target, target=self.source, summary=f"{self.target} to {self.source}", names=names,
                     pairs=pairs)  # fmt: skip


@cache
def remaps() -> dict[str, Remap]:
    """Return every remap into the MAISI vocabulary, by the name of its source."""
    from .plugins import plugins

    found: dict[str, Remap] = {"raw125": _raw_remap()}
    for entry in plugins().registry("labels"):
        target = entry.target
        if isinstance(target, Mapping) and "pairs" not in target:
            continue  # a label
        if entry.name in ("raw125", "maisi"):
            raise UsageError(f"the label set {entry.name!r} of {entry.owner} comes with maisi", hint="choose another name")
        if isinstance(target, Mapping):
            pairs = _plugin_pairs(entry, target["pairs"])
            remap = Remap(source=entry.name, target="maisi", summary=entry.summary, names={key: f"id {key}" for key in pairs},
                          pairs=pairs)  # fmt: skip
        else:
            remap = replace(_read_remap(Path(str(target))), source=entry.name)
        found[entry.name] = remap
    return found


def _plugin_pairs(entry: Entry[Any], table: Any) -> dict[int, int]:
    try:
        pairs = {int(key): int(value) for key, value in table.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the label set {entry.name!r} of {entry.owner} is not a remap table: {error}", hint="correct the plugin"
        ) from error
    strange = next((value for value in pairs.values() if value != 0 and value not in maisi()), None)
    if strange is not None:
        raise UsageError(f"the label set {entry.name!r} of {entry.owner} maps to {strange}, which MAISI does not have",
                         hint="see  maisi labels list")  # fmt: skip
    return pairs


def _raw_remap() -> Remap:
    pairs = {label.raw: label.id for label in maisi().labels if label.raw is not None}
    names = {label.raw: label.name for label in maisi().labels if label.raw is not None}
    return Remap(source="raw125", target="maisi", summary="channels of the mask autoencoder", names=names, pairs=pairs)


def _read_remap(path: Path) -> Remap:
    if not path.is_file():
        raise UsageError(f"the remap table {path} does not exist", hint="see  maisi labels show totalsegmentator")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not text
        raise UsageError(f"{path} cannot be read: {error}", hint="correct the file") from error
    try:
        names = {int(row["id"]): str(row["name"]) for row in data["label"]}
        pairs = {int(row["id"]): maisi().id(row["maisi"]) for row in data["label"] if "maisi" in row}
        return Remap(source=data["name"], target="maisi", summary=data.get("summary", ""), names=names, pairs=pairs)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a remap table: {error}", hint="see  maisi labels show totalsegmentator") from error


def remap_table(source: str, target: str = "maisi") -> Remap:
    """Return the remap from `source` to `target`: names such as `totalsegmentator`, or a `.toml` file of one's own.

    Raises `UsageError` with near matches.
    """
    if source == target == "maisi":
        same = {value: value for value in maisi().ids()}
        return Remap(source="maisi", target="maisi", summary="unchanged",
                     names={value: maisi().name_of(value) for value in same}, pairs=same)  # fmt: skip
    if source == "maisi":
        return remap_table(target).inverse()
    if target != "maisi":
        raise UsageError(f"labels are mapped to or from maisi, not {source} to {target}", hint="map in two steps")
    if source.endswith(".toml"):
        return _read_remap(Path(source))
    if source not in remaps():
        raise unknown("label set", source, ["maisi", *remaps()], see="maisi labels list --sets")
    return remaps()[source]
