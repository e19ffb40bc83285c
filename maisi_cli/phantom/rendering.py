"""From labels to Hounsfield units: tissue by tissue, with texture, contrast phase, partial volume and
noise.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import UsageError
from ..geometry import Geometry
from ..volumes import AIR_HU, Mask, Volume
from .frame import Array, smooth_noise

# mean HU in the native, arterial and portal-venous phase; medians of healthy adults
_TISSUE: dict[str, tuple[float, float, float]] = {
    "liver": (56, 72, 108),
    "spleen": (47, 105, 120),
    "pancreas": (38, 90, 88),
    "right kidney": (32, 150, 170),
    "left kidney": (32, 150, 170),
    "right adrenal gland": (25, 55, 62),
    "left adrenal gland": (25, 55, 62),
    "gallbladder": (8, 10, 12),
    "bladder": (6, 8, 20),
    "prostate": (36, 55, 66),
    "thyroid gland": (95, 150, 140),
    "esophagus": (32, 42, 48),
    "stomach": (30, 38, 42),
    "duodenum": (28, 44, 52),
    "small bowel": (26, 46, 54),
    "colon": (24, 34, 40),
    "heart": (40, 190, 145),
    "left atrial appendage": (42, 240, 150),
    "aorta": (42, 290, 160),
    "inferior vena cava": (42, 90, 140),
    "superior vena cava": (42, 210, 150),
    "pulmonary vein": (42, 270, 155),
    "portal vein and splenic vein": (42, 95, 165),
    "hepatic vessel": (44, 70, 155),
    "brain": (34, 38, 40),
    "spinal cord": (28, 32, 34),
    "trachea": (-985, -985, -985),
    "airway": (-960, -960, -960),
    "costal cartilages": (105, 108, 110),
    "prostate ": (36, 50, 60),
    "lung tumor": (32, 55, 62),
    "pancreatic tumor": (26, 42, 52),
    "hepatic tumor": (38, 52, 66),
    "colon cancer primaries": (40, 70, 84),
    "bone lesion": (120, 130, 140),
    "left kidney cyst": (6, 6, 8),
    "right kidney cyst": (6, 6, 8),
}
_GROUP: dict[str, tuple[float, float, float]] = {
    "vessel": (42, 190, 140),
    "muscle": (54, 58, 62),
    "lung": (-850, -845, -840),
    "spine": (165, 172, 178),
    "rib": (190, 195, 200),
    "bone": (185, 190, 195),
    "organ": (36, 50, 60),
    "bowel": (28, 40, 48),
    "tumor": (36, 52, 64),
    "cyst": (6, 6, 8),
    "dummy": (40, 45, 50),
    "nervous": (30, 34, 36),
    "airway": (-960, -960, -960),
    "heart": (42, 190, 145),
    "plugin": (40, 48, 55),
}
PHASES = ("native", "arterial", "portal-venous")
FAT_HU, MUSCLE_HU, SKIN_HU = -104.0, 54.0, 20.0


@cache
def _tables() -> tuple[NDArray[np.float32], dict[str, NDArray[np.bool_]]]:
    from ..anatomy import maisi

    means = np.full((3, 256), 40.0, dtype=np.float32)
    groups: dict[str, NDArray[np.bool_]] = {}
    for label in maisi().labels:
        means[:, label.id] = _TISSUE.get(label.name, _GROUP.get(label.group, (40.0, 45.0, 50.0)))
        groups.setdefault(label.group, np.zeros(256, dtype=bool))[label.id] = True
    means[:, 0] = AIR_HU
    return means, groups


@cache
def _limb_bones() -> NDArray[np.bool_]:
    """Return which ids are bones of the girdles and limbs, which thick muscles cover."""
    from ..anatomy import maisi

    table = np.zeros(256, dtype=bool)
    for bone in ("scapula", "humerus", "clavicula", "femur"):
        for side in ("left", "right"):
            table[maisi().id(f"{side} {bone}")] = True
    return table


def render(mask: Mask, seed: int, *, noise_hu: float | None = None, contrast: str | None = None) -> Volume:
    """Render a mask of the MAISI vocabulary as a CT volume in HU, clipped to [-1024, 1500].

    `contrast` is one of `PHASES`, drawn from the seed when None; `noise_hu` is the standard deviation of
    the correlated noise, 6..18 HU when None. Works for any mask, a patient's included: inside the body
    envelope the tissue follows from the distance to the skin, to the bones and to the labelled organs.
    Equal input gives equal output.
    """
    from ..anatomy import maisi

    if contrast is not None and contrast not in PHASES:
        raise UsageError(f"there is no contrast phase {contrast!r}", hint=f"use {', '.join(PHASES)}")
    rng = np.random.default_rng([0x48552020, seed])
    phase = PHASES.index(contrast) if contrast else int(rng.choice(3, p=(0.35, 0.2, 0.45)))
    noise = float(rng.uniform(6, 18)) if noise_hu is None else noise_hu
    means, groups = _tables()
    labels, geometry = mask.array, mask.geometry
    ids = maisi().id
    personal = means[phase] + rng.normal(0, 5, 256).astype(np.float32)
    for soft in ("muscle", "spine", "rib", "bone"):  # one person's bones and muscles agree with one another
        personal[groups[soft]] = means[phase][groups[soft]] + rng.normal(0, 7 if soft == "muscle" else 22)
    blood = float(rng.normal(1, 0.12))
    for vessel in (*np.flatnonzero(groups["vessel"]), *np.flatnonzero(groups["heart"])):
        personal[vessel] = 42 + (means[phase][vessel] - 42) * blood + rng.normal(0, 4)
    hu = personal[labels]
    mm = geometry.spacing
    wide = smooth_noise(rng, labels.shape, [30 / m for m in mm])
    fine = smooth_noise(rng, labels.shape, [7 / m for m in mm])
    solid = labels > 0
    hu[solid] += (5 * wide + 4 * fine)[solid]
    _envelope(hu, labels, groups, geometry, rng, fine)
    _bone(hu, labels, groups, mm, rng, fine)
    _lungs(hu, labels, groups, mm, rng, ids, float(personal[ids("pulmonary vein")]))
    _hollow(hu, labels, mm, rng, ids, wide, fine)
    if phase:
        _heart(hu, labels, mm, ids)
        _kidneys(hu, labels, mm, ids, phase)
        _liver_vessels(hu, labels, mm, rng, ids, phase)
    hu[labels == 0] = AIR_HU
    hu = ndimage.gaussian_filter(hu, [min(0.55, 0.9 / m) if m < 1.2 else 0.5 for m in mm])
    grain = ndimage.gaussian_filter(rng.standard_normal(labels.shape).astype(np.float32), 0.55)
    grain *= noise / max(float(grain[::4, ::4, ::4].std()), 1e-6)
    grain[labels == 0] *= 0.5
    return Volume(array=np.clip(hu + grain, -1024, 1500).astype(np.float32), geometry=geometry, modality="ct")


def _envelope(
    hu: Array,
    labels: NDArray[np.uint8],
    groups: dict[str, NDArray[np.bool_]],
    geometry: Geometry,
    rng: np.random.Generator,
    fine: Array,
) -> None:
    """Tell skin, fat and unlabelled muscle apart inside label 200, from distances alone."""
    body = labels == 200
    if not body.any():
        return
    mm = np.asarray(geometry.spacing)
    step = np.maximum(1, np.round(4.0 / mm)).astype(int)
    small = labels[:: step[0], :: step[1], :: step[2]]
    sampling = mm * step
    skeletal = groups["muscle"] | groups["rib"] | groups["spine"] | groups["bone"]
    inner = (small > 0) & (small != 200)
    inner &= ~groups["muscle"][small]
    # the cavity: what a 30 mm closing of all organs and bones fills; its rim is the muscular wall
    far = ndimage.distance_transform_edt(~inner, sampling=sampling) if inner.any() else np.full(small.shape, 1e3)
    grown = np.pad(far < 30, 1, mode="edge")
    cavity_depth = ndimage.distance_transform_edt(grown, sampling=sampling)[1:-1, 1:-1, 1:-1] - 30
    firm = skeletal[small]
    to_muscle = ndimage.distance_transform_edt(~firm, sampling=sampling) if firm.any() else np.full(small.shape, 1e3)
    limbs = _limb_bones()[small]
    to_limb = ndimage.distance_transform_edt(~limbs, sampling=sampling) if limbs.any() else np.full(small.shape, 1e3)
    organs = inner & ~skeletal[small]
    to_organ = ndimage.distance_transform_edt(~organs, sampling=sampling) if organs.any() else np.full(small.shape, 1e3)
    skin_depth = ndimage.distance_transform_edt(np.pad(small > 0, 1, mode="edge"), sampling=sampling)[1:-1, 1:-1, 1:-1]
    zoom = [n / s for n, s in zip(labels.shape, small.shape, strict=True)]
    cavity_depth, to_muscle, to_limb, to_organ, skin_depth = (
        ndimage.zoom(f.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
        for f in (cavity_depth, to_muscle, to_limb, to_organ, skin_depth)
    )
    ripple = 2.0 * fine
    thickness = 9.0 + rng.uniform(-2, 3)
    depth = cavity_depth + ripple
    rim = (depth > -0.9 * thickness) & (depth < 0.5 * thickness) & (to_organ > 2)
    near = (to_muscle < 5.5 + ripple) & (to_organ > 4)
    limb = (to_limb < 27 + ripple) & (to_organ > 8)
    muscle = (rim | near | limb) & (skin_depth > 5)
    soft = np.where(muscle, MUSCLE_HU + rng.normal(0, 5), FAT_HU + rng.normal(0, 4)).astype(np.float32)
    lung = groups["lung"][labels]
    if lung.any():  # the mediastinum and the hila: vessels and nodes between the lungs
        close = ndimage.binary_dilation(lung, iterations=max(1, int(4 / mm.mean())))
        soft[body & close & (fine > 0.2) & ~muscle] = 20.0
    first, second = (smooth_noise(rng, labels.shape, [14 / m for m in mm]) for _ in range(2))
    strand = (first**2 + second**2 < 0.03) & ~muscle & (cavity_depth > 8) & (to_organ > 3)
    soft[strand] = 25.0  # the vessels of the mesentery
    soft += 5 * fine
    wall = ndimage.binary_erosion(labels > 0, iterations=max(1, round(2.0 / float(mm.mean()))), border_value=1)
    soft[body & ~wall] = SKIN_HU
    hu[body] = soft[body]


def _bone(
    hu: Array,
    labels: NDArray[np.uint8],
    groups: dict[str, NDArray[np.bool_]],
    mm: tuple[float, ...],
    rng: np.random.Generator,
    fine: Array,
) -> None:
    bone = (groups["spine"] | groups["rib"] | groups["bone"])[labels]
    from ..anatomy import maisi

    bone &= labels != maisi().id("costal cartilages")
    if not bone.any():
        return
    inside = ndimage.distance_transform_edt(bone, sampling=mm)[bone]
    cortex = np.exp(-((inside / (1.1 * float(np.mean(mm)))) ** 2)).astype(np.float32)
    skull = labels[bone] == maisi().id("skull")
    shaft = np.isin(labels[bone], [maisi().id(f"{s} {n}") for s in ("left", "right") for n in ("femur", "humerus")])
    hu[bone] += (360 + 60 * rng.normal()) * cortex + 45 * fine[bone] - 45 * (1 - cortex)
    hu[bone] += np.where(skull, 420.0, 0) + np.where(shaft, 240 * cortex, 0)


def _lungs(
    hu: Array,
    labels: NDArray[np.uint8],
    groups: dict[str, NDArray[np.bool_]],
    mm: tuple[float, ...],
    rng: np.random.Generator,
    ids: Any,
    blood: float,
) -> None:
    lung = groups["lung"][labels]
    if not lung.any():
        return
    box = ndimage.find_objects(lung.astype(np.uint8))[0]
    view = lung[box]
    middle = float(np.argwhere(view.any(axis=(1, 2))).mean())  # the midline, when both lungs are in view
    vessel = np.zeros(view.shape, dtype=np.float32)
    for lobes in (
        ("left lung upper lobe", "left lung lower lobe"),
        ("right lung upper lobe", "right lung middle lobe", "right lung lower lobe"),
    ):
        vessel = np.maximum(vessel, vessel_tree(np.isin(labels[box], [ids(name) for name in lobes]), middle, mm, rng))
    height = np.linspace(-1, 1, view.shape[1], dtype=np.float32)[None, :, None]
    air = rng.normal(-862, 20) - 26 * height + 14 * smooth_noise(rng, view.shape, [16 / m for m in mm])
    rendered = air + vessel * (blood - air)
    hu[box][view] = rendered[view]


def vessel_tree(inside: NDArray[np.bool_], middle: float, mm: tuple[float, ...], rng: np.random.Generator) -> Array:
    """Grow a tree of vessels through a lung and return the share of every voxel that it fills, 0..1.

    Random end points, nearest first, are joined to the tree where the way from the hilum stays short; the
    radius follows Murray's law, so that vessels taper outward. `middle` is the voxel column of the midline.
    """
    shape = inside.shape
    filled = np.zeros(shape, dtype=np.float32)
    where = np.argwhere(inside)
    if len(where) < 50:
        return filled
    step = np.asarray(mm)
    centre = where.mean(axis=0)
    gap = (where - [middle, centre[1] - 0.05 * shape[1], centre[2] + 0.04 * shape[2]]) * step
    hilum = where[np.argmin((gap**2).sum(axis=1))] * step
    count = int(np.clip(len(where) * step.prod() / 1000 * 0.15, 12, 360))
    ends = where[rng.integers(0, len(where), count)] * step + rng.uniform(-0.4, 0.4, (count, 3)) * step
    ends = ends[np.argsort(((ends - hilum) ** 2).sum(axis=1))]
    nodes, way, parent = [hilum], [0.0], [-1]
    leaves = [0]
    for end in ends:
        place = np.asarray(nodes)
        reach = np.sqrt(((place - end) ** 2).sum(axis=1))
        joint = int(np.argmin(reach + 0.55 * np.asarray(way)))
        pieces = max(1, round(reach[joint] / 9))
        start, sag = place[joint], rng.normal(0, 0.08 * reach[joint], 3)
        for piece in range(1, pieces + 1):
            t = piece / pieces
            at = start + (end - start) * t + sag * np.sin(np.pi * t)
            way.append(way[joint] + float(np.linalg.norm(at - nodes[joint])))
            nodes.append(at)
            parent.append(joint)
            leaves.append(int(piece == pieces))
            joint = len(nodes) - 1
    for child in range(len(nodes) - 1, 0, -1):
        leaves[parent[child]] += leaves[child]
    points, widths = [], []
    for child in range(1, len(nodes)):
        a, b = nodes[parent[child]], nodes[child]
        pieces = max(2, round(float(np.linalg.norm(b - a)) / (0.6 * step.min())))
        points.append(a + (b - a) * np.linspace(0, 1, pieces, endpoint=False)[:, None])
        widths.append(np.full(pieces, 0.85 * leaves[child] ** 0.37))
    _stamp(filled, np.concatenate(points), np.concatenate(widths), step)
    return filled * inside


def _stamp(filled: Array, points: NDArray[np.float64], radii: NDArray[np.float64], mm: NDArray[np.float64]) -> None:
    """Draw balls into `filled`, with partial volume at their rims and for those smaller than a voxel."""
    voxel = float(mm.mean())
    size = np.maximum(radii, 0.5 * voxel)
    share = np.minimum(1.0, np.pi * radii**2 / voxel**2)
    hull = np.ceil(size / voxel).astype(int)
    base = np.round(points / mm).astype(int)
    for reach in np.unique(hull):
        some = hull == reach
        spans = [np.arange(-k, k + 1) for k in np.maximum(1, np.ceil((reach * voxel + voxel / 2) / mm)).astype(int)]
        for offset in np.stack(np.meshgrid(*spans, indexing="ij"), axis=-1).reshape(-1, 3):
            at = base[some] + offset
            away = np.sqrt((((at * mm) - points[some]) ** 2).sum(axis=1))
            part = np.clip((size[some] - away) / voxel + 0.5, 0, 1) * share[some]
            fits = (part > 0) & ((at >= 0) & (at < filled.shape)).all(axis=1)
            np.maximum.at(filled, tuple(at[fits].T), part[fits].astype(np.float32))


def _hollow(
    hu: Array,
    labels: NDArray[np.uint8],
    mm: tuple[float, ...],
    rng: np.random.Generator,
    ids: Any,
    wide: Array,
    fine: Array,
) -> None:
    """Gas above fluid in stomach, stool and gas in the colon, a little gas in the small bowel, air in the
    gullet.
    """
    for name, gas_share, stool in (
        ("stomach", rng.uniform(0.0, 0.45), False),
        ("colon", rng.uniform(0.12, 0.6), True),
        ("small bowel", rng.uniform(0, 0.05), False),
        ("duodenum", rng.uniform(0, 0.1), False),
    ):
        where = labels == ids(name)
        box = ndimage.find_objects(where.astype(np.uint8))
        if not box:
            continue
        view = where[box[0]]
        core = ndimage.distance_transform_edt(np.pad(view, 1), sampling=mm)[1:-1, 1:-1, 1:-1] > max(2.5, min(mm))
        if not core.any():
            continue
        up = np.linspace(0, 1, view.shape[1], dtype=np.float32)[None, :, None]
        score = 0.5 * up + 0.22 * wide[box[0]] + 0.05 * fine[box[0]]
        part = hu[box[0]]
        part[core] = 14 + 6 * wide[box[0]][core] + 4 * fine[box[0]][core]
        if stool:
            crumbs = smooth_noise(rng, view.shape, [5 / m for m in mm])
            part[core] = 10 + 50 * fine[box[0]][core] - 330 * np.clip(crumbs[core] - 0.2, 0, 1.2)
        cut = np.quantile(score[core], 1 - gas_share)
        part[core & (score > cut)] = -880
        hu[box[0]] = part


def _heart(hu: Array, labels: NDArray[np.uint8], mm: tuple[float, ...], ids: Any) -> None:
    """Set the muscle of the left ventricle apart from the enhanced blood: a thick rim on the left, a
    septum.
    """
    where = labels == ids("heart")
    box = ndimage.find_objects(where.astype(np.uint8))
    if not box:
        return
    view = where[box[0]]
    depth = ndimage.distance_transform_edt(np.pad(view, 1, mode="edge"), sampling=mm)[1:-1, 1:-1, 1:-1]
    centre = np.argwhere(view).mean(axis=0)
    x, y, z = (mm[i] * (np.arange(view.shape[i]) - centre[i]) for i in range(3))
    left = -x[:, None, None] + 0.3 * y[None, :, None] - 0.2 * z[None, None, :]
    rim = (left > 4) & (depth < 10)
    septum = (np.abs(left - 6) < 4.5) & (y[None, :, None] - 0.4 * z[None, None, :] > -12)
    part = hu[box[0]]
    muscle = view & (rim | septum)
    part[muscle] = 0.45 * part[muscle] + 50
    hu[box[0]] = part


def _kidneys(hu: Array, labels: NDArray[np.uint8], mm: tuple[float, ...], ids: Any, phase: int) -> None:
    for side in ("left", "right"):
        box = ndimage.find_objects((labels == ids(f"{side} kidney")).astype(np.uint8))
        if not box:
            continue
        view = labels[box[0]] == ids(f"{side} kidney")
        depth = ndimage.distance_transform_edt(np.pad(view, 1), sampling=mm)[1:-1, 1:-1, 1:-1]
        medulla = np.clip((depth - 8) / 6, 0, 1)
        part = hu[box[0]]
        part[view] -= (medulla * (85 if phase == 1 else 38))[view]
        hu[box[0]] = part


def _liver_vessels(
    hu: Array,
    labels: NDArray[np.uint8],
    mm: tuple[float, ...],
    rng: np.random.Generator,
    ids: Any,
    phase: int,
) -> None:
    where = labels == ids("liver")
    box = ndimage.find_objects(where.astype(np.uint8))
    if not box:
        return
    view = where[box[0]]
    a, b = (smooth_noise(rng, view.shape, [36 / m for m in mm]) for _ in range(2))
    vessel = np.exp(-(a**2 + b**2) / (2 * 0.16**2))
    part = hu[box[0]]
    part[view] += (vessel * (12 if phase == 1 else 42))[view]
    hu[box[0]] = part
