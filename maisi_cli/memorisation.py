"""The search for copies: generated cases that lie nearer to a real one than real ones lie to one another.

Each case is described by its label map on a coarse grid over the body (`mask`), by the latent that a VAE makes of the
coarse image (`latent`), or by the coarse image itself (`intensity`). The distance of a generated case to its nearest real
one is held against the null: the distances of each real case to its nearest real one. A large z means that chance does not
make cases that near. A small z does not mean that nothing was copied: only that no copy was found in these descriptions at
this threshold.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import BODY
from .cases import Case
from .errors import UsageError
from .events import Note, OnEvent, Stage, Step, ignore
from .judging import Terms, load
from .quality.findings import Finding, judged
from .volumes import Mask, Volume

if TYPE_CHECKING:
    from PIL.Image import Image

SPACES = ("mask", "latent", "intensity")
THRESHOLD = 4.0
"""The default z: see `docs/quality.md` for what lies on either side of it."""
MASK_GRID = 32
IMAGE_GRID = 48
COARSE_GRID = 32
LEAST_REFERENCE = 5
FEW_REFERENCE = 20
FLOOR = 1e-3
"""Distances below this count as this: a copy is a copy."""
LEAST_SPREAD = 0.1
"""The spread of the null (of log distances) is not taken for smaller than this."""

Encoder = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""From a coarse image of intensities in [0, 1] to a vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A case by its description in each space; a space that a case cannot be described in is absent."""

    case: Case
    vectors: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """The nearest reference case of a generated one in a space.

    `z` says by how many spreads of the null the distance is smaller than its median, both of the logarithm; `rank` is the
    share of reference cases (and this one) whose own neighbour is as near.
    """

    id: str
    space: str
    nearest: str
    distance: float
    usual: float
    z: float
    rank: float

    def as_dict(self) -> dict[str, Any]:
        """Return the neighbour as `qc --memorization --json` shows it."""
        return {"id": self.id, "space": self.space, "nearest": self.nearest, "distance": self.distance,
                "null_median": self.usual, "z": self.z, "rank": self.rank}  # fmt: skip

    def finding(self, threshold: float) -> Finding:
        """Return the finding: z above the threshold fails."""
        near = self.z > threshold
        text = f"{self.space} distance {self.distance:.3f} to {self.nearest}, real cases lie {self.usual:.3f} apart (z {self.z:.1f}): "
        text += f"too near for chance at this threshold ({threshold:g})" if near else f"no copy found at this threshold ({threshold:g})"
        return judged("memorisation", self.space, self.z, text, high=threshold)


# --- descriptions -------------------------------------------------------------------------------


def body_box(image: Volume | None, mask: Mask | None) -> tuple[slice, ...]:
    """Return the box of the body: of the labels, or of what is not air."""
    if mask is not None and mask.array.any():
        inside = mask.array > 0
    elif image is not None:
        values = image.array
        inside = values > (-500.0 if image.modality.startswith("ct") else 0.1 * float(np.percentile(values, 99.5)))
    else:
        raise ValueError("a case without image and labels has no body")
    found = ndimage.find_objects(inside.astype(np.uint8))
    return tuple(found[0]) if found else tuple(slice(0, n) for n in inside.shape)


def coarse_labels(mask: Mask, box: tuple[slice, ...], n: int = MASK_GRID) -> NDArray[np.uint8]:
    """Return the labels at the centres of n x n x n cells of a box, flat; the body without a label (200) becomes 0."""
    part = mask.array[box]
    rows = [np.minimum(((np.arange(n) + 0.5) * size / n).astype(int), size - 1) for size in part.shape]
    found = part[np.ix_(*rows)].ravel()
    return np.where(found == BODY, 0, found).astype(np.uint8)


def coarse_image(image: Volume, box: tuple[slice, ...], n: int = IMAGE_GRID) -> NDArray[np.float32]:
    """Return the image in n x n x n cells of a box, intensities in [0, 1]; smoothed where cells are larger than voxels."""
    part = np.asarray(image.array[box], dtype=np.float32)
    if image.modality.startswith("ct"):
        low, high = -1000.0, 1000.0
    else:
        low, high = 0.0, max(1e-6, float(np.percentile(part, 99.5)))
    part = np.asarray((np.clip(part, low, high) - low) / (high - low), dtype=np.float32)
    widths = [size / n for size in part.shape]
    part = ndimage.uniform_filter(part, [max(1, round(width)) for width in widths], mode="nearest")
    rows = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * width - 0.5 for width in widths), indexing="ij"))
    coarse: NDArray[np.float32] = ndimage.map_coordinates(part, rows, order=1, mode="nearest", output=np.float32)
    return coarse


def encoder(model: str, *, device: str = "auto") -> Encoder:
    """Return the encoder of a model's VAE. Raises `CannotRun` where its weights are not installed."""
    import dataclasses

    import torch

    from .catalog import model as find_model
    from .networks import Precision, device_named
    from .networks import load as load_networks
    from .weights import locate

    spec = dataclasses.replace(find_model(model), scale_factor=1.0)  # the correlation of latents knows no scale
    where = device_named(device)
    precision = Precision.named("fp32" if where.type == "cpu" else "auto", where)
    networks = load_networks(spec, ["vae"], device=where, precision=precision, files=locate(spec, ["vae"]))

    def encode(values: NDArray[np.float32]) -> NDArray[np.float32]:
        latent: NDArray[np.float32] = networks.encode(torch.from_numpy(values)[None, None])[0].cpu().numpy()
        return latent

    return encode


def describe(case: Case, terms: Terms, spaces: Sequence[str], encode: Encoder | None = None) -> Described:
    """Read a case and describe it in each space that its files allow. Raises `UsageError` for a file that cannot be read."""
    image, mask, _, _ = load(case, terms)
    box = body_box(image, mask)
    vectors: dict[str, NDArray[Any]] = {}
    if "mask" in spaces and mask is not None:
        labels = coarse_labels(mask, box)
        if labels.any():
            vectors["mask"] = labels
    if image is not None and "latent" in spaces and encode is not None:
        vectors["latent"] = _unit(encode(coarse_image(image, box)))
    if image is not None and "intensity" in spaces:
        vectors["intensity"] = _unit(coarse_image(image, box, COARSE_GRID))
    return Described(case=case, vectors=vectors)


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a vector of mean 0 and length 1, so that a product of two is their correlation."""
    flat = values.ravel() - values.mean()
    return np.asarray(flat / max(1e-12, float(np.linalg.norm(flat))), dtype=np.float32)


def describe_all(
    cases: Sequence[Case], terms: Terms, spaces: Sequence[str], encode: Encoder | None = None, *, stage: str = "describe",
    on_event: OnEvent = ignore,
) -> list[Described]:  # fmt: skip
    """Describe cases; one that cannot be read is left out, and said."""
    on_event(Stage(name=stage, detail=f"{len(cases)} cases"))
    found = []
    for done, case in enumerate(cases, 1):
        try:
            found.append(describe(case, terms, spaces, encode))
        except UsageError as error:
            on_event(Note(text=f"{case.id} is left out: {error.message}", level="warning"))
        on_event(Step(stage=stage, done=done, total=len(cases)))
    return found


# --- distances ------------------------------------------------------------------------------------


def distances(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Return the distances of rows to rows: 1 - Dice over all organs of label rows (uint8), else 1 - correlation.

    The Dice is twice the number of cells with the same label over the number of labelled cells of both.
    """
    if one.dtype != np.uint8:
        correlations: NDArray[np.float64] = (one @ other.T).astype(np.float64)
        return np.clip(1 - correlations, 0, 2)
    sizes = np.count_nonzero(one, axis=1)[:, None] + np.count_nonzero(other, axis=1)[None]
    same = np.empty(sizes.shape, dtype=np.int64)
    for k, row in enumerate(one):
        same[k] = np.count_nonzero((other == row) & (row > 0), axis=1)
    return 1 - 2 * same / np.maximum(1, sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """How near real cases lie to one another: the distance of each to its nearest other one, with median and spread of the log."""

    rows: NDArray[Any]
    distances: NDArray[np.float64]
    middle: float
    spread: float

    @classmethod
    def of(cls, real: Sequence[Described], space: str) -> Null:
        """Measure the null of real cases, each left out in turn."""
        rows = np.stack([each.vectors[space] for each in real])
        among = distances(rows, rows)
        np.fill_diagonal(among, np.inf)
        nearest = among.min(axis=1)
        logs = np.log(np.maximum(nearest, FLOOR))
        middle = float(np.median(logs))
        spread = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(logs - middle))))
        return cls(rows=rows, distances=nearest, middle=middle, spread=spread)

    def z(self, distance: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Return by how many spreads distances are smaller than the median."""
        return np.asarray((self.middle - np.log(np.maximum(distance, FLOOR))) / self.spread)


def neighbours(generated: Sequence[Described], reference: Sequence[Described], space: str) -> list[Neighbour]:
    """Return the nearest reference case of each generated one in a space, held against the null.

    Cases without that space are left out. Raises `UsageError` for fewer than 5 reference cases.
    """
    real = [each for each in reference if space in each.vectors]
    made = [each for each in generated if space in each.vectors]
    if not made:
        return []
    if len(real) < LEAST_REFERENCE:
        raise UsageError(f"{len(real)} reference cases have a {space}; the null needs {LEAST_REFERENCE}",
                         hint="give --reference a folder with more cases, or choose other --spaces")  # fmt: skip
    null = Null.of(real, space)
    found = []
    for each, row in zip(made, distances(np.stack([m.vectors[space] for m in made]), null.rows), strict=True):
        nearest = int(np.argmin(row))
        distance = float(row[nearest])
        found.append(
            Neighbour(
                id=each.case.id,
                space=space,
                nearest=real[nearest].case.id,
                distance=distance,
                usual=float(np.exp(null.middle)),
                z=float(null.z(distance)),
                rank=(1 + int(np.count_nonzero(null.distances <= distance))) / (len(real) + 1),
            )
        )
    return found


def twins(reference: Sequence[Described], space: str, threshold: float) -> int:
    """Return how many reference cases lie as near to another as a copy would: repeated scans, or files stored twice."""
    real = [each for each in reference if space in each.vectors]
    if len(real) < LEAST_REFERENCE:
        return 0
    null = Null.of(real, space)
    return int(np.count_nonzero(null.z(null.distances) > threshold))


# --- the audit -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the search found: the neighbour of every generated case in every space, nearest first."""

    neighbours: tuple[Neighbour, ...]
    threshold: float
    references: int
    twins: dict[str, int]
    cases: dict[str, Case]

    @property
    def passed(self) -> bool:
        """Whether no copy was found at the threshold."""
        return all(each.z <= self.threshold for each in self.neighbours)

    def of(self, id: str) -> list[Neighbour]:
        """Return the neighbours of one generated case."""
        return [each for each in self.neighbours if each.id == id]

    def summary(self) -> str:
        """Say the outcome in one sentence."""
        copies = {each.id for each in self.neighbours if each.z > self.threshold}
        held = f"among {self.references} reference cases (z {self.threshold:g})"
        if not copies:
            return f"no copy found at this threshold {held}"
        return f"{len(copies)} {'case is' if len(copies) == 1 else 'cases are'} too near to a real case for chance {held}"

    def as_dict(self) -> dict[str, Any]:
        """Return the audit as `qc --memorization --json` shows it."""
        return {"threshold": self.threshold, "references": self.references, "reference_twins": dict(self.twins),
                "summary": self.summary(), "neighbours": [each.as_dict() for each in self.neighbours]}  # fmt: skip


def audit(
    generated: Sequence[Case], reference: Sequence[Case], terms: Terms, *, spaces: Sequence[str] = ("mask", "latent"),
    model: str = "nano-ct", threshold: float = THRESHOLD, device: str = "auto", on_event: OnEvent = ignore,
) -> Audit:  # fmt: skip
    """Look for generated cases that are too near to a reference case.

    `model` names the model whose VAE makes the latents. Raises `UsageError` for an unknown space, fewer than 5 reference
    cases, and cases that share no space with them.
    """
    for space in spaces:
        if space not in SPACES:
            raise UsageError(f"there is no space {space!r}", hint=f"use {', '.join(SPACES)}")
    if len(reference) < LEAST_REFERENCE:
        raise UsageError(f"the reference holds {len(reference)} cases; the null needs {LEAST_REFERENCE}",
                         hint="give --reference a folder with more cases")  # fmt: skip
    if len(reference) < FEW_REFERENCE:
        on_event(Note(text=f"{len(reference)} reference cases make a rough null; {FEW_REFERENCE} or more are better", level="warning"))
    encode = encoder(model, device=device) if "latent" in spaces else None
    real = describe_all(reference, terms, spaces, encode, stage="reference", on_event=on_event)
    made = describe_all(generated, terms, spaces, encode, stage="generated", on_event=on_event)
    found = [each for space in spaces for each in neighbours(made, real, space)]
    if not found:
        raise UsageError("no case can be described in these spaces", hint="mask needs label maps, latent and intensity need images")
    close = {space: number for space in spaces if (number := twins(real, space, threshold))}
    for space, number in close.items():
        on_event(Note(text=f"{number} reference cases lie as near to one another as copies in {space} space: repeated scans?"))
    named = {f"generated/{each.id}": each for each in generated} | {f"reference/{each.id}": each for each in reference}
    return Audit(
        neighbours=tuple(sorted(found, key=lambda each: -each.z)), threshold=threshold, references=len(real), twins=close, cases=named
    )


def pair_picture(one: Neighbour, cases: dict[str, Case], terms: Terms) -> bytes:
    """Return a PNG of a generated case beside its neighbour, generated left."""
    from PIL import Image

    from .preview import BACKGROUND, draw

    halves: list[Image.Image] = []
    for side, name in (("generated", one.id), ("reference", one.nearest)):
        image, mask, _, _ = load(cases[f"{side}/{name}"], terms)
        drawn = draw(image, mask, title=f"{side}: {name}")
        halves.append(drawn.resize((760, round(drawn.height * 760 / drawn.width)), Image.Resampling.LANCZOS))
    whole = Image.new("RGB", (2 * 760 + 8, max(half.height for half in halves)), BACKGROUND)
    whole.paste(halves[0], (0, 0))
    whole.paste(halves[1], (760 + 8, 0))
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG")
    return buffer.getvalue()


def pair_name(one: Neighbour) -> Path:
    """Return the file name of a pair's picture."""
    return Path(f"{one.id}__{one.nearest}.png".replace("/", "_"))
