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
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders, or images with their label map beside them (*_image, *_label).")],
    labels: Annotated[str, typer.Option("--labels", metavar="NAME|FILE", help="Vocabulary of the label maps.")] = "maisi",
    anatomy: Annotated[str | None, typer.Option("--anatomy", metavar="A,B", help="Organs that every mask must contain.", show_default=False)] = None,
    modality: Annotated[str, typer.Option("--modality", metavar="NAME", help="Modality of the images.")] = "ct",
    compat: Annotated[str | None, typer.Option("--compat", metavar="reference", help="The reference's own numerics where they differ.", show_default=False)] = None,
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Check image and label pairs: HU, organs, labels. Exit code 1 when one fails."""
    from ..catalog import modality as find_modality
    from ..errors import UsageError
    from ..quality import check
    from ..volumes import read_image

    if compat not in (None, "reference"):
        raise UsageError(f"--compat {compat!r} is not known", hint="use --compat reference")
    kind = find_modality(modality).name
    required = [name for name in (anatomy or "").split(",") if name.strip()]
    cases = []
    for name, image, label in _pairs(paths):
        mask = _mask(label, labels) if label else None
        verdict = check(read_image(image, modality=kind), mask, required=required, compat=compat == "reference")
        cases.append({"id": name, **verdict.as_dict()})
        if not as_json:
            _show(name, verdict)
            if mask is None:
                output.say(f"{name}: no label map beside it, so only its values were checked")
    passed = all(case["passed"] for case in cases)
    if as_json:
        output.json_out({"schema": "maisi.qc/1", "cases": cases, "passed": passed})
    else:
        output.say(f"{sum(bool(case['passed']) for case in cases)} of {len(cases)} passed")
    if not passed:
        raise typer.Exit(1)


def _mask(path: Path, labels: str) -> Any:
    from ..masks import map_labels
    from ..volumes import read_mask

    mask = read_mask(path)
    return mask if labels == "maisi" else map_labels(mask, labels)


def _show(name: str, verdict: Verdict) -> None:
    output.data(f"{'pass' if verdict.passed else 'FAIL'}  {name}")
    for finding in verdict.failures():
        output.data(f"      {finding.text}")


def _pairs(paths: list[Path]) -> list[tuple[str, Path, Path | None]]:
    """Return (id, image, label) of every image that the paths name or hold; a label map belongs to the image of its name."""
    from ..errors import UsageError

    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*.nii*") if _stem(each) != _stem(each).removesuffix("_image"))
            if not found:
                raise UsageError(f"{path} holds no *_image.nii.gz", hint="name the files themselves, or another folder")
            images += found
        elif path.is_file():
            if not _stem(path).endswith("_label"):
                images.append(path)
        else:
            raise UsageError(f"there is no file or folder {path}", hint="check the path")
    if not images:
        raise UsageError("only label maps were named", hint="name the images; label maps are found beside them")
    rows = []
    for image in images:
        stem = _stem(image).removesuffix("_image")
        label = next((each for end in (".nii.gz", ".nii") if (each := image.with_name(f"{stem}_label{end}")).is_file()), None)
        rows.append((stem, image, label))
    return rows


def _stem(path: Path) -> str:
    return path.name.split(".nii")[0]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("qc", epilog=examples("maisi qc run/", "maisi qc run/ --anatomy liver,spleen --json"))(qc)
