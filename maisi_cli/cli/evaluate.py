"""`maisi qc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Json, Quiet, Verbose, examples

if TYPE_CHECKING:
    from ..quality import Verdict


def qc(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders, images with their label map beside them (*_image, *_label), or label maps alone.")],
    labels: Annotated[str, typer.Option("--labels", metavar="NAME|FILE", help="Vocabulary of the label maps.")] = "maisi",
    anatomy: Annotated[str | None, typer.Option("--anatomy", metavar="A,B", help="Organs that every mask must contain.", show_default=False)] = None,
    modality: Annotated[str, typer.Option("--modality", metavar="NAME", help="Modality of the images.")] = "ct",
    compat: Annotated[str | None, typer.Option("--compat", metavar="reference", help="The reference's own numerics where they differ.", show_default=False)] = None,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Check image and label pairs: HU, organs, labels. Exit code 1 when one fails.

    Of a label map without an image only its labels are checked.
    """
    from ..catalog import modality as find_modality
    from ..errors import UsageError
    from ..quality import check
    from ..volumes import read_image

    if compat not in (None, "reference"):
        raise UsageError(f"--compat {compat!r} is not known", hint="use --compat reference")
    kind = find_modality(modality).name
    required = [name for name in (anatomy or "").split(",") if name.strip()]
    cases = []
    for name, file, label in _pairs(paths):
        image = read_image(file, modality=kind) if file else None
        if file and not label and not _stem(file).endswith("_image") and _is_label_map(file, image):
            image, label = None, file
        mask = _mask(label, labels) if label else None
        verdict = check(image, mask, required=required, compat=compat == "reference")
        checked = bool(verdict.findings)
        cases.append({"id": name, **verdict.as_dict(), "passed": checked and verdict.passed})
        if not as_json:
            _show(name, verdict)
        if not checked:
            output.say(f"{name}: no check applies to it, so it did not pass")
        elif mask is None:
            output.say(f"{name}: no label map beside it, so only its values were checked")
        elif image is None:
            output.say(f"{name}: no image beside it, so only its labels were checked")
    passed = all(case["passed"] for case in cases)
    if as_json:
        output.json_out({"schema": "maisi.qc/1", "cases": cases, "passed": passed})
    else:
        output.say(f"{sum(bool(case['passed']) for case in cases)} of {len(cases)} passed")
    if not passed:
        raise typer.Exit(1)


def _is_label_map(path: Path, image: Any) -> bool:
    """Say whether a file holds labels: its header says so, or what should be CT holds whole numbers of 0..255 alone."""
    import numpy as np

    from ..volumes import is_label_map

    if is_label_map(path):
        return True
    values = image.array
    return bool(image.modality.startswith("ct") and values.min() >= 0 and values.max() <= 255 and np.array_equal(values, np.rint(values)))


def _mask(path: Path, labels: str) -> Any:
    from ..masks import map_labels
    from ..volumes import read_mask

    mask = read_mask(path)
    return mask if labels == "maisi" else map_labels(mask, labels)


def _show(name: str, verdict: Verdict) -> None:
    output.data(f"{'none' if not verdict.findings else 'pass' if verdict.passed else 'FAIL'}  {name}")
    for finding in verdict.failures():
        output.data(f"      {finding.text}")


def _pairs(paths: list[Path]) -> list[tuple[str, Path | None, Path | None]]:
    """Return (id, image, label map) of all that the paths name or hold; the two belong together by name, and each may lack the other."""
    from ..errors import UsageError

    named: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*.nii*") if _stem(each).endswith(("_image", "_label")))
            if not found:
                raise UsageError(f"{path} holds no *_image.nii.gz or *_label.nii.gz", hint="name the files themselves, or another folder")
            named += found
        elif path.is_file():
            named.append(path)
        else:
            raise UsageError(f"there is no file or folder {path}", hint="check the path")
    rows: dict[Path, tuple[str, Path | None, Path | None]] = {}
    for path in named:
        stem = _stem(path).removesuffix("_image").removesuffix("_label")
        is_label = _stem(path).endswith("_label")
        other = next(filter(None, (_beside(path, stem, end) for end in (("_image", "") if is_label else ("_label",)))), None)
        image, label = (other, path) if is_label else (path, other)
        rows.setdefault(path.with_name(stem), (stem, image, label))
    return list(rows.values())


def _beside(path: Path, stem: str, end: str) -> Path | None:
    """Return the file of the same case whose name has this end."""
    return next((each for kind in (".nii.gz", ".nii") if (each := path.with_name(f"{stem}{end}{kind}")).is_file()), None)


def _stem(path: Path) -> str:
    return path.name.split(".nii")[0]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("qc", epilog=examples("maisi qc run/", "maisi qc run/ --anatomy liver,spleen --json"))(qc)
