"""Pictures of the bundled model to look at, and the figures that go with them: `python tests/pictures.py OUT`.

Writes `ten.png` (ten seeds side by side: axial, coronal, sagittal), and, where ../shared is, `patient.png`
(a real CT above the one made for its own mask). Prints each seed's check and the patient's correlation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from maisi_cli import generate
from maisi_cli.cli import run
from maisi_cli.preview import BACKGROUND, PLANES, SOFT_TISSUE_HU, centre, cut
from maisi_cli.volumes import Mask, Volume, read_image
from PIL import Image, ImageDraw

PIXELS_PER_MM = 0.75
GAP = 6


def panels(image: Volume, mask: Mask) -> list[Image.Image]:
    """Return the three planes through the middle of the organs, in the soft-tissue window, to scale."""
    where, (low, high) = centre(image, mask), SOFT_TISSUE_HU
    fov = image.geometry.fov_mm
    return [
        Image.fromarray(np.uint8(np.clip((cut(image.array, plane, where) - low) / (high - low), 0, 1) * 255)).resize(
            (round(fov[plane.columns] * PIXELS_PER_MM), round(fov[plane.rows] * PIXELS_PER_MM)), Image.Resampling.LANCZOS
        )
        for plane in PLANES
    ]


def sheet(columns: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Return captioned columns of panels as one picture."""
    width = max(panel.width for _, column in columns for panel in column) + GAP
    height = max(sum(panel.height + GAP for panel in column) for _, column in columns) + 24
    picture = Image.new("RGB", (GAP + width * len(columns), height), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for number, (caption, column) in enumerate(columns):
        x, y = GAP + width * number, 24
        pen.text((x + 2, 6), caption)
        for panel in column:
            picture.paste(panel, (x, y))
            y += panel.height + GAP
    return picture


def ten(out: Path, count: int = 10) -> None:
    """Draw ten seeds of the main job."""
    columns = []
    for sample in generate(preset="chest-abdomen", seed=100, count=count, on_qc_fail="keep", out=str(out / "ten"), force=True):
        assert sample.image is not None
        assert sample.mask is not None
        assert sample.verdict is not None
        print(f"seed 100/{sample.index}: quality check {'passed' if sample.verdict.passed else 'failed'}", flush=True)
        columns.append((f"100/{sample.index}", panels(sample.image, sample.mask)))
    half = -(-len(columns) // 2)
    rows = [sheet(columns[:half]), sheet(columns[half:])]
    picture = Image.new("RGB", (rows[0].width, rows[0].height + rows[1].height), BACKGROUND)
    picture.paste(rows[0], (0, 0))
    picture.paste(rows[1], (0, rows[0].height))
    picture.save(out / "ten.png")


def patient(out: Path, real_ct: Path, real_seg: Path) -> None:
    """Draw a patient's CT beside the one that is made for its mask, by the README's three commands."""
    mapped, whole = str(out / "case_maisi.nii.gz"), str(out / "case_body.nii.gz")
    assert run(["labels", "map", str(real_seg), mapped, "--from", "totalsegmentator", "--force"]) == 0
    assert run(["labels", "add-body", mapped, whole, "--ct", str(real_ct), "--force"]) == 0
    (sample,) = generate(mask=whole, seed=3, on_qc_fail="keep", out=str(out / "patient"), force=True)
    assert sample.image is not None
    assert sample.mask is not None
    real = read_image(real_ct)
    inside = sample.mask.array > 0
    correlation = np.corrcoef(np.clip(real.array[inside], -1000, 1000), sample.image.array[inside])[0, 1]
    print(f"patient: grid {sample.image.array.shape}, correlation with the real CT inside the body {correlation:.3f}")
    sheet([("real CT", panels(real, sample.mask)), ("made for its mask", panels(sample.image, sample.mask))]).save(out / "patient.png")


def main() -> None:
    """Draw both."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    ten(out)
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    if data.is_dir():
        patient(out, data / "ct_torso.nii.gz", data / "ct_torso_seg.nii.gz")


if __name__ == "__main__":
    main()
