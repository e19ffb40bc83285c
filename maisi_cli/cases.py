"""Cases on disk: which images and label maps of a folder belong together, whoever named them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import UsageError
from .files import NIFTI_ENDS, stem

IMAGE_ENDS = ("_image", "_img", "_ct", "_mr", "_0000")
LABEL_ENDS = ("_label", "_labels", "_seg", "_segmentation", "_mask", "-label", "-seg")
IMAGE_NAMES = ("image", "img", "ct", "mr", "mri")
LABEL_NAMES = ("label", "labels", "seg", "segmentation", "segmentations", "mask")
LABEL_FOLDER = re.compile(r"^(labels|masks|segmentations)(Tr|Ts|Tst|Val)?$")
OTHER_CHANNEL = re.compile(r"_0(?!000$)\d{3}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An image and the label map that belongs to it; either may be missing. `typed` is the file that was named itself.

    `label` may be a folder with a file per class, as TotalSegmentator writes it.
    """

    id: str
    image: Path | None
    label: Path | None
    typed: Path | None = None


def find_cases(paths: Iterable[Path], *, label_dir: Path | None = None) -> list[Case]:
    """Return the cases that files and folders name or hold, in the order of their names.

    Images and label maps are paired by name: `a_image` and `a_label` (also `_ct`, `_seg`, `_mask` and the like, or `a` and
    `a_seg`), nnU-Net's `imagesTr/a_0000` and `labelsTr/a`, TotalSegmentator's `ct` beside `segmentations`, one file or a
    folder with a file per class; with `label_dir`, `a` in the one folder and in the other. Each may lack the other. Raises
    `UsageError` for what does not exist and for a folder without NIfTI files.
    """
    if label_dir is not None and not label_dir.is_dir():
        raise UsageError(f"there is no folder {label_dir}", hint="--label-dir names the folder of the label maps")
    cases: dict[Path, Case] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*.nii*") if is_nifti(each) and not _hidden(each.relative_to(path)))
            if not found:
                raise UsageError(f"{path} holds no NIfTI file", hint="name another folder, or the files themselves")
            for case in sorted(_paired(found, path, label_dir), key=lambda case: (_key(case).parent, case.id)):
                cases.setdefault(_key(case), case)
        elif path.is_file():
            case = _around(path, label_dir)
            cases.setdefault(_key(case), case)
        else:
            raise UsageError(f"there is no file or folder {path}", hint="check the path")
    return _distinct(list(cases.values()))


def is_nifti(path: Path) -> bool:
    """Say whether a NIfTI file of this name is there."""
    return path.name.endswith(NIFTI_ENDS) and path.is_file()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _key(case: Case) -> Path:
    return (case.image or case.label or Path()).absolute()


def _base(path: Path) -> str:
    """Return what an image's and a label map's name have in common."""
    name = stem(path)
    for end in (*IMAGE_ENDS, *LABEL_ENDS):
        if name.endswith(end) and len(name) > len(end):
            return name.removesuffix(end)
    return name


def _is_label(path: Path) -> bool:
    """Say whether a file is a label map by its name or that of its folder."""
    name = stem(path)
    return name.endswith(LABEL_ENDS) or name in LABEL_NAMES or bool(LABEL_FOLDER.match(path.parent.name))


def _paired(files: Sequence[Path], root: Path, label_dir: Path | None) -> Iterator[Case]:
    inside = None if label_dir is None else label_dir.absolute()
    images = [each for each in files if not (_is_label(each) if inside is None else inside in each.absolute().parents)]
    used: set[Path] = set()
    for image in images:
        if OTHER_CHANNEL.search(stem(image)) and image.with_name(image.name.replace(stem(image), _channel_0(image))) in files:
            continue  # another channel of the same case
        label = _label_of(image, label_dir, root)
        used.update(_inside(label))
        yield Case(id=_id(image), image=image, label=label)
    if label_dir is None:
        folders = {each.parent for each in files if _is_label(each) and each not in used and _per_class(each.parent)}
        for folder in sorted(folders):
            yield Case(id=folder.parent.name, image=None, label=folder)
        for each in files:
            if _is_label(each) and each not in used and each.parent not in folders:
                yield Case(id=_id(each), image=None, label=each)


def _channel_0(image: Path) -> str:
    return OTHER_CHANNEL.sub("_0000", stem(image))


def _inside(label: Path | None) -> list[Path]:
    if label is None:
        return []
    return [each for each in label.iterdir() if is_nifti(each)] if label.is_dir() else [label]


def _per_class(folder: Path) -> bool:
    """Say whether a folder holds a file per class of one case."""
    return folder.name == "segmentations" and any(_file(folder.parent, name) for name in IMAGE_NAMES)


def _file(folder: Path, name: str) -> Path | None:
    return next((each for kind in NIFTI_ENDS if (each := folder / f"{name}{kind}").is_file()), None)


def _label_of(image: Path, label_dir: Path | None, root: Path) -> Path | None:
    """Return the label map of an image."""
    base, name, folder = _base(image), stem(image), image.parent
    places: list[tuple[Path, str]] = []
    if label_dir is not None:
        sub = label_dir / folder.relative_to(root) if folder.is_relative_to(root) else label_dir
        places += [(each, f"{root}{end}") for each in (sub, label_dir) for root in (name, base) for end in ("", *LABEL_ENDS)]
        return next((found for place in places if (found := _file(*place))), None)
    places += [(folder, f"{start}{end}") for start in dict.fromkeys((base, name)) for end in LABEL_ENDS]
    if name in IMAGE_NAMES:
        places += [(folder, each) for each in LABEL_NAMES]
    beside = re.sub(r"^(images?|imgs?)(?=$|[A-Z_])", "labels", folder.name)
    if beside != folder.name:
        places += [(folder.parent / each, start) for each in (beside, beside.replace("labels", "masks")) for start in (base, name)]
    found = next((each for place in places if (each := _file(*place)) and each != image), None)
    if (
        found is None
        and name in IMAGE_NAMES
        and (folder / "segmentations").is_dir()
        and any(map(is_nifti, (folder / "segmentations").iterdir()))
    ):
        return folder / "segmentations"
    return found


def _around(path: Path, label_dir: Path | None) -> Case:
    """Return the case of one file that was named."""
    if not _is_label(path) or label_dir is not None:
        return Case(id=_base(path), image=path, label=_label_of(path, label_dir, path.parent), typed=path)
    base, folder = _base(path), path.parent
    places = [(folder, f"{base}{end}") for end in (*IMAGE_ENDS, "")]
    if stem(path) in LABEL_NAMES:
        places += [(folder, each) for each in IMAGE_NAMES]
    if LABEL_FOLDER.match(folder.name):
        images = folder.parent / LABEL_FOLDER.sub(r"images\2", folder.name)
        places += [(images, f"{base}{end}") for end in ("_0000", "", "_image")]
    image = next((each for place in places if (each := _file(*place)) and each != path), None)
    return Case(id=_base(path), image=image, label=path, typed=path)


def _id(path: Path) -> str:
    """Return a case's name: that of its file, or of its folder where the file's is `ct`, `segmentations` and the like."""
    base = _base(path)
    return path.absolute().parent.name if base in (*IMAGE_NAMES, *LABEL_NAMES) else base


def _distinct(cases: list[Case]) -> list[Case]:
    """Put the folder before the names that several cases share."""
    seen: dict[str, int] = {}
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
    return [
        case if seen[case.id] == 1 else replace(case, id=f"{(case.image or case.label or Path()).absolute().parent.name}/{case.id}")
        for case in cases
    ]
