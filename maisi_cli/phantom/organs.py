"""The organs, vessels and muscles of chest, abdomen and pelvis, painted in order of priority."""

from __future__ import annotations

import numpy as np

from .frame import _ORGANS, Array, Canvas, Ids, keep_largest, profile, spine_y
from .skeleton import Wall


def paint(canvas: Canvas, wall: Wall) -> None:
    """Paint everything soft: vessels first, the loops of small bowel, which take what is left, last."""
    from ..anatomy import maisi

    ids = maisi().id
    rng = np.random.default_rng([_ORGANS, canvas.seed])
    inside = (-wall.shell - 5.5).astype(np.float32)  # > 0 inside the ribs and the abdominal muscles
    dome = diaphragm(canvas, wall, rng)
    above = np.minimum(inside, canvas.z - dome).astype(np.float32)
    below = np.minimum(inside, dome - 4 - canvas.z).astype(np.float32)
    _vessels(canvas, ids, rng)
    _thorax(canvas, wall, above, ids, rng)
    _retroperitoneum(canvas, below, ids, rng)
    _upper_abdomen(canvas, below, inside, ids, rng)
    _pelvis(canvas, ids, rng)
    _colon(canvas, below, ids, rng)
    _muscles(canvas, wall, inside, ids)
    _small_bowel(canvas, wall, below, ids, rng)


def diaphragm(canvas: Canvas, wall: Wall, rng: np.random.Generator) -> Array:
    """Return the height of the diaphragm (mm) above every point: two domes that fall to the chest wall."""
    right, left = 252 + rng.normal(0, 9), 240 + rng.normal(0, 9)
    side = 1 / (1 + np.exp(-canvas.x / 14))
    top = left + (right - left) * side
    across = (np.abs(canvas.x) - 62) / (wall.half_width * 0.62)
    along = (canvas.y - wall.centre_y - 10) / (wall.half_depth * 0.95)
    radial = np.sqrt(across**2 + along**2)
    back = np.clip(-along, 0, 1)
    fall = (58 + 62 * back) * np.minimum(radial, 1.5) ** 2.4
    return np.asarray(top - fall, dtype=np.float32)


def _vessels(canvas: Canvas, ids: Ids, rng: np.random.Generator) -> None:
    bend = canvas.habitus.bend

    def before(z: float, gap: float) -> float:
        return float(spine_y(z, bend)) + gap

    wide = 1 + 0.1 * rng.normal()
    aorta: list[tuple[float, float, float]] = [
        (4, 36, 312),
        (14, 42, 340),
        (10, 34, 374),
        (-6, 14, 388),
        (-20, -14, 376),
        (-26, -20, 345),
    ]
    aorta += [(-24, before(z, 22), z) for z in (300.0, 260.0, 220.0)] + [(-16, before(z, 29), z) for z in (180.0, 140.0)]
    aorta += [(-12, before(z, 29), z) for z in (100.0, 60.0, 40.0)]
    canvas.tube(ids("aorta"), aorta, np.linspace(15.5, 9.0, len(aorta)) * wide)
    cava = [(18, before(z, 27), z) for z in (28.0, 70.0, 110.0, 150.0)] + [
        (24, 24, 195),
        (26, 26, 232),
        (22, 28, 270),
    ]
    canvas.tube(ids("inferior vena cava"), cava, [10, 10.5, 11, 12, 12.5, 13, 13], squash=(1.15, 0.9, 1))
    for side, word in ((-1, "left"), (1, "right")):
        artery = [
            (side * 4 - 12, before(38, 29), 40),
            (side * 26 - 4, 38, -2),
            (side * 44, 24, -46),
            (side * 66, 46, -96),
            (side * 82, 54, -150),
            (side * 86, 48, -240),
        ]
        canvas.tube(ids(f"{word} iliac artery"), artery[:5], [7, 6.5, 6, 5.5, 5])
        vein = [
            (side * 6 + 16, before(28, 24), 30),
            (side * 28 + 4, 22, -8),
            (side * 48, 10, -50),
            (side * 64, 36, -98),
            (side * 76, 44, -150),
        ]
        canvas.tube(ids(f"{word} iliac vena"), vein, [9, 8, 7.5, 7, 6.5])
    canvas.tube(ids("superior vena cava"), [(26, 24, 312), (27, 26, 345), (24, 28, 374)], 10)
    canvas.tube(ids("right brachiocephalic vein"), [(24, 28, 374), (32, 26, 392), (40, 22, 408)], 7.5)
    canvas.tube(ids("left brachiocephalic vein"), [(22, 34, 376), (0, 46, 388), (-24, 36, 402), (-38, 22, 410)], 7)
    canvas.tube(ids("brachiocephalic trunk"), [(8, 30, 388), (16, 22, 402), (22, 14, 416)], 6.5)
    canvas.tube(ids("left common carotid artery"), [(-2, 20, 392), (-14, 12, 420), (-22, 8, 470), (-24, 14, 530)], 4.2)
    canvas.tube(ids("right common carotid artery"), [(22, 14, 416), (24, 10, 440), (24, 10, 470), (25, 14, 530)], 4.2)
    canvas.tube(ids("left subclavian artery"), [(-14, 2, 392), (-24, -4, 416), (-46, 4, 428), (-78, 14, 424)], 5)
    canvas.tube(ids("right subclavian artery"), [(24, 12, 418), (44, 8, 428), (78, 14, 424)], 5)


def _thorax(canvas: Canvas, wall: Wall, above: Array, ids: Ids, rng: np.random.Generator) -> None:
    carina = 350 + rng.normal(0, 4)
    canvas.tube(ids("trachea"), [(0, 14, 520), (0, 10, 470), (1, 2, 420), (2, -6, 380), (2, -8, carina)], 8.2)
    gullet: list[tuple[float, float, float]] = [(-4, float(spine_y(z)) + 22, z) for z in (480.0, 430.0, 380.0)]
    gullet += [(-6, float(spine_y(z)) + 27, z) for z in (340.0, 300.0)] + [
        (-12, 0, 262),
        (-20, 16, 240),
        (-30, 24, 226),
    ]
    canvas.tube(ids("esophagus"), gullet, 7.5, squash=(1.2, 0.9, 1))

    size = 1 + 0.07 * rng.normal()
    x, y, z = -24 + rng.normal(0, 5), 46 + rng.normal(0, 4), 282 + rng.normal(0, 5)
    heart = ids("heart")
    veins = ids("pulmonary vein")
    for side in (-1, 1):
        canvas.tube(veins, [(side * 10, 8, 304), (side * 28, 4, 312), (side * 50, 4, 336)], [8, 6, 4])
        canvas.tube(veins, [(side * 10, 6, 298), (side * 28, -4, 294), (side * 48, -18, 272)], [8, 6, 4])
    canvas.ellipsoid(ids("left atrial appendage"), (-44, 40, 322), (10, 15, 10))
    canvas.ellipsoid(heart, (x, y, z), (58 * size, 42 * size, 46 * size), rough=0.025, power=2.2, turn_deg=(24, 22, -34))
    canvas.ellipsoid(heart, (12, 38, 296), (34, 30, 34), rough=0.02)
    canvas.tube(heart, [(-14, 52, 318), (-14, 38, 336), (-10, 18, 340)], [15, 13, 11])  # the pulmonary trunk
    canvas.tube(heart, [(-12, 20, 338), (-30, 2, 340), (-42, -10, 332)], [11, 9, 7])
    canvas.tube(heart, [(-10, 20, 336), (12, 6, 332), (38, -2, 322)], [11, 9, 7])
    airway = ids("airway")
    for side in (-1, 1):
        root = (side * 34, -8, carina - (34 if side < 0 else 24))
        canvas.tube(airway, [(2, -8, carina + 2), (side * 16, -9, carina - 12), root], [8, 7, 6])
        for tip in ((58, 14, 26), (66, -22, -18), (52, -34, -58), (62, 26, -46)):
            canvas.tube(airway, [root, (side * tip[0], tip[1], carina - 24 + tip[2])], [4.6, 2.8])
    thyroid = ids("thyroid gland")
    for side in (-1, 1):
        canvas.ellipsoid(thyroid, (side * 17, 20, 462), (9, 10, 22), rough=0.04)
    canvas.ellipsoid(thyroid, (0, 25, 456), (12, 5, 7))

    # lungs: inside the ribs and above the diaphragm, beside a mediastinum that is narrow at the top
    half = profile(canvas.z, [(180, 36), (240, 28), (300, 23), (360, 22), (400, 20), (440, 17)])
    half = half + 3.5 * canvas.grain[0] - 10 * np.clip((canvas.y - 40) / 30, 0, 1)
    middle = ((canvas.x + 4) / half) ** 2 + ((canvas.y - 16) / 90) ** 2
    backbone = spine_y(canvas.z, canvas.habitus.bend)
    aside = np.clip((np.abs(canvas.x) - 18) / 32, 0, 1)
    gutter = backbone - 12 + aside * (wall.centre_y - wall.half_depth - backbone + 12)  # in front of the ribs' necks
    lung = (above > 0) & (middle > 1) & (canvas.z < 447) & (wall.shell < -8)
    lung &= (canvas.y > gutter) & ((np.abs(canvas.x) > 26) | (canvas.y > backbone))
    lung &= canvas.level((slice(None),) * 3, (x, y, z), (66 * size, 50 * size, 54 * size), turn_deg=(24, 22, -34)) > 1
    slope = 1.05 + 0.1 * rng.normal()
    oblique = canvas.z - (366 + rng.normal(0, 6) - slope * (canvas.y + 62)) + 3 * canvas.grain[0]
    horizontal = canvas.z - (298 + rng.normal(0, 5)) + 3 * canvas.grain[1]
    right = canvas.x > 0
    free = canvas.labels == 200
    for name, where in (
        ("left lung upper lobe", ~right & (oblique > 0)),
        ("left lung lower lobe", ~right & (oblique <= 0)),
        ("right lung upper lobe", right & (oblique > 0) & (horizontal > 0)),
        ("right lung middle lobe", right & (oblique > 0) & (horizontal <= 0)),
        ("right lung lower lobe", right & (oblique <= 0)),
    ):
        canvas.labels[lung & where & free] = ids(name)


def _retroperitoneum(canvas: Canvas, below: Array, ids: Ids, rng: np.random.Generator) -> None:
    common = float(np.clip(1 + 0.06 * rng.normal(), 0.88, 1.14))
    for side, word, low in ((1, "right", 108.0), (-1, "left", 122.0)):
        z = low + rng.normal(0, 7)
        size = common * float(1 + 0.02 * rng.normal())
        x, y = side * (70 + rng.normal(0, 3)), -10 + rng.normal(0, 3)
        label = ids(f"{word} kidney")
        canvas.ellipsoid(
            label,
            (x, y, z),
            (27 * size, 26 * size, 55 * size),
            rough=0.025,
            power=2.1,
            turn_deg=(12, side * 12, side * -35),
            where=below,
        )
        sinus = canvas.box((x - 40, y - 40, z - 40), (x + 40, y + 40, z + 40))
        if sinus is not None:  # the hilum: a notch of fat on the inner side
            level = canvas.level(sinus, (x - side * 23, y + 10, z), (17, 12, 18))
            view = canvas.labels[sinus]
            view[(level < 1) & (view == label)] = 200
        gland = ids(f"{word} adrenal gland")
        gx, gz = side * 40 - (4 if side < 0 else -4), z + 52
        canvas.tube(gland, [(gx, 18, gz - 2), (gx + side * 8, 4, gz - 12)], [4, 3.2], squash=(1, 1, 1.7))
        canvas.tube(gland, [(gx, 18, gz), (gx - side * 5, 0, gz - 8)], [4, 3.2], squash=(1, 1, 1.7))


def _upper_abdomen(canvas: Canvas, below: Array, inside: Array, ids: Ids, rng: np.random.Generator) -> None:
    portal = ids("portal vein and splenic vein")
    canvas.tube(portal, [(8, 44, 128), (18, 44, 146), (38, 40, 172), (54, 38, 186)], [7, 7.5, 7.5, 6])
    canvas.tube(portal, [(8, 44, 132), (-22, 32, 146), (-58, 8, 158), (-82, -8, 166)], [6.5, 5.5, 5, 4.5])
    size = float(np.clip(0.95 + 0.08 * rng.normal(), 0.8, 1.15))
    gall = rng.uniform(0.7, 1.25)
    canvas.ellipsoid(
        ids("gallbladder"),
        (54, 66, 128),
        (15 * gall, 18 * gall, 27 * gall),
        turn_deg=(28, -12, 0),
        where=below,
    )
    vein = ids("hepatic vessel")
    hilum = (26, 26, 226)
    for tip in ((70, 0, 214), (40, 60, 214), (-12, 52, 214), (92, 30, 196)):
        canvas.tube(
            vein,
            [hilum, tuple((a + b) / 2 + 4 for a, b in zip(hilum, tip, strict=True)), tip],
            [5.5, 4.2, 2.6],
            where=below,
        )
    for tip in ((86, 46, 172), (84, 6, 168), (8, 62, 196)):
        canvas.tube(vein, [(54, 38, 186), tip], [5.0, 2.8], where=below)
    liver = ids("liver")
    edge = canvas.z - (88 + 0.62 * (112 - canvas.x) + rng.normal(0, 8)) + 5 * canvas.grain[0]
    edge += 12 - 30 * np.exp(-(((canvas.y - 8) / 34) ** 2)) + 0.12 * (canvas.y - 20)  # colon and kidney press upward
    lobe = np.minimum(below + 2, edge).astype(np.float32)
    canvas.ellipsoid(liver, (66, 16, 186), (77 * size, 92 * size, 98 * size), rough=0.02, power=2.6, where=lobe)
    canvas.ellipsoid(
        liver,
        (-4, 56, 212),
        (76 * size, 40, 34 * size),
        rough=0.03,
        power=2.3,
        turn_deg=(0, -12, 0),
        where=lobe,
    )
    spleen = float(np.clip(1 + 0.12 * rng.normal(), 0.82, 1.35))
    canvas.ellipsoid(
        ids("spleen"),
        (-104, -20, 176),
        (28 * spleen, 44 * spleen, 50 * spleen),
        rough=0.03,
        power=2.2,
        turn_deg=(-24, 12, -24),
        where=below,
    )
    pancreas = [(32, 40, 104), (24, 46, 122), (2, 54, 134), (-28, 44, 142), (-58, 18, 152), (-82, -2, 160)]
    canvas.tube(ids("pancreas"), pancreas, np.array([15, 17, 12, 13, 13, 9]) * (1 + 0.08 * rng.normal()), rough=0.10)
    full = rng.uniform(0.75, 1.25)
    stomach = [
        (-52, 12, 226),
        (-64, 26, 204),
        (-66, 50, 176),
        (-50, 66, 150),
        (-22, 72, 138),
        (8, 68, 136),
        (24, 62, 138),
    ]
    canvas.tube(ids("stomach"), stomach, np.array([30, 36, 31, 26, 21, 15, 10]) * full**0.5, rough=0.06, where=inside)
    duodenum = [
        (24, 60, 138),
        (42, 50, 136),
        (48, 36, 118),
        (46, 28, 86),
        (26, 26, 74),
        (-6, 40, 80),
        (-26, 42, 100),
    ]
    canvas.tube(ids("duodenum"), duodenum, 11.5, rough=0.10, where=inside)
    for label in (liver, ids("spleen"), ids("stomach"), ids("pancreas")):
        keep_largest(canvas.labels, label)


def _pelvis(canvas: Canvas, ids: Ids, rng: np.random.Generator) -> None:
    full = rng.uniform(0.6, 1.15)
    canvas.ellipsoid(
        ids("bladder"),
        (rng.normal(0, 3), 30, -92 + 14 * full),
        (42 * full, 34 * full, 36 * full),
        rough=0.02,
        power=2.3,
    )
    if canvas.habitus.sex == "male":
        canvas.ellipsoid(ids("prostate"), (0, 8, -130), (22, 17, 17), rough=0.03)


def _colon(canvas: Canvas, below: Array, ids: Ids, rng: np.random.Generator) -> None:
    sag = rng.normal(0, 12)
    colon = ids("colon")
    ascending = [(82, 42, -40), (94, 34, 0), (98, 18, 44), (98, 12, 84), (84, 32, 112)]
    across = [
        (84, 32, 112),
        (64, 74, 100 - sag / 2),
        (24, 88, 82 - sag),
        (-24, 88, 84 - sag),
        (-66, 72, 112),
        (-96, 26, 150),
    ]
    descending = [(-96, 26, 150), (-104, 2, 132), (-104, 6, 80), (-102, 14, 30), (-98, 34, -20)]
    sigmoid = [
        (-98, 34, -20),
        (-74, 50, -52),
        (-34, 48, -52 + rng.normal(0, 8)),
        (6, 34, -38),
        (16, 4, -48),
        (4, -32, -72),
        (0, -38, -104),
        (0, -30, -140),
        (0, -28, -160),
    ]
    haustra = 1 + 0.16 * np.sin(np.arange(40) * 2.1 + rng.uniform(0, 6))
    for path, wide in ((ascending, 25), (across, 19), (descending, 15), (sigmoid, 14.5)):
        gauge = wide * float(np.clip(1 + 0.14 * rng.normal(), 0.75, 1.35))
        canvas.tube(
            colon,
            path,
            gauge * haustra[: len(path)],
            rough=0.13,
            where=(-1 * np.minimum(-below, 0)) if path is across else None,
        )


def _muscles(canvas: Canvas, wall: Wall, inside: Array, ids: Ids) -> None:
    bend, strength = canvas.habitus.bend, canvas.habitus.muscle
    for side, word in ((-1, "left"), (1, "right")):
        back = [
            (
                side * profile(z, [(-60, 20), (0, 32), (100, 36), (200, 30), (400, 24)]).item(),
                float(spine_y(z, bend)) - 46 + (10 if z > 230 else 0),
                z,
            )
            for z in np.arange(-70, 440, 34.0)
        ]
        gauge = profile(
            np.array([p[2] for p in back], dtype=np.float32),
            [(-70, 9), (0, 21), (90, 25), (200, 20), (420, 13)],
        )
        canvas.tube(ids(f"{word} autochthon"), back, gauge * strength, rough=0.05, squash=(1.2, 0.85, 1))
        psoas = [
            (side * 26, float(spine_y(150, bend)) + 6, 146),
            (side * 42, 12, 96),
            (side * 54, 14, 44),
            (side * 66, 18, -10),
            (side * 82, 34, -70),
            (side * 100, 30, -130),
        ]
        canvas.tube(ids(f"{word} iliopsoas"), psoas, np.array([9, 17, 22, 23, 19, 14]) * strength, rough=0.05)
        canvas.tube(
            ids(f"{word} iliopsoas"),
            [(side * 100, 8, 26), (side * 92, 14, -20), (side * 86, 30, -66)],
            np.array([9, 15, 16]) * strength,
            squash=(0.9, 1.6, 1),
        )
        wing = (0, 0, side * -31)  # the wing of the ilium runs outward from behind to in front
        canvas.ellipsoid(ids(f"{word} gluteus minimus"), (side * 106, -12, -52), (14, 38, 40), rough=0.05, turn_deg=wing)
        canvas.ellipsoid(
            ids(f"{word} gluteus medius"),
            (side * 114, -24, -30),
            (24, 58, 62),
            rough=0.05,
            power=2.3,
            turn_deg=wing,
        )
        canvas.ellipsoid(
            ids(f"{word} gluteus maximus"),
            (side * 80, -80, -92),
            (60, 21, 78),
            rough=0.06,
            power=2.5,
            turn_deg=(0, side * 26, side * 26),
        )


def _small_bowel(canvas: Canvas, wall: Wall, below: Array, ids: Ids, rng: np.random.Generator) -> None:
    """Lay two layers of winding loops into the peritoneal space that is left."""
    roof = 122 - 0.3 * np.abs(canvas.x) - 0.008 * (canvas.y - 70) ** 2
    space = np.minimum(np.minimum(-wall.shell - 9, below - 5), roof - canvas.z)
    space = np.minimum(space, canvas.y - 22 - 0.1 * np.abs(canvas.x)).astype(np.float32)
    gauge = rng.uniform(10.5, 13.0)
    for depth in (90.0, 57.0):
        loops = []
        for row, z in enumerate(np.arange(-56.0, 112.0, 2.15 * gauge)):
            reach = 86 * np.sqrt(max(0.1, 1 - ((z - 30) / 130) ** 2))
            across = np.linspace(-reach, reach, 7) * (1 if row % 2 else -1)
            wave = 9 * np.sin(np.arange(7) * 2.0 + rng.uniform(0, 6.3))
            jitter = rng.normal(0, 4.5, (7, 3))
            loops += [(x + j[0], depth + w + j[1], z + 0.5 * w + j[2]) for x, w, j in zip(across, wave, jitter, strict=True)]
        width = gauge * rng.uniform(0.75, 1.12, len(loops))
        canvas.tube(ids("small bowel"), loops, width, rough=0.12, where=space)
