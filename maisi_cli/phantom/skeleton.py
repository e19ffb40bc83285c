"""The body's outline, the chest wall and the bones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .frame import LEVELS, Array, Canvas, Ids, profile, spine_y

# the wall: mid-surface of ribs and abdominal muscles. z, half width, half depth, y of its centre
_WALL = (
    (-170, 118, 80, 2),
    (-60, 126, 88, 14),
    (0, 126, 90, 24),
    (60, 124, 88, 28),
    (120, 130, 92, 22),
    (180, 138, 98, 14),
    (240, 138, 100, 6),
    (300, 128, 94, 0),
    (350, 110, 82, -4),
    (395, 82, 64, -6),
    (430, 56, 46, -8),
    (455, 36, 34, -8),
    (480, 28, 30, -6),
)
# what lies between wall and skin besides fat: z, lateral, posterior, anterior (mm)
_COVER = (
    (-170, 50, 52, 12),
    (-90, 46, 54, 10),
    (-30, 32, 44, 10),
    (10, 16, 34, 10),
    (60, 12, 32, 10),
    (150, 13, 30, 9),
    (240, 20, 28, 10),
    (300, 28, 28, 14),
    (350, 44, 30, 18),
    (395, 78, 34, 16),
    (425, 96, 36, 14),
    (450, 44, 36, 22),
    (475, 30, 38, 28),
    (560, 30, 40, 26),
)
# how much of the subcutaneous fat is found at a height, relative to the belly
_FAT = (
    (-300, 0.55),
    (-120, 0.9),
    (-40, 1.0),
    (80, 1.0),
    (200, 0.75),
    (320, 0.55),
    (420, 0.45),
    (470, 0.2),
    (760, 0.1),
)

RIB_ENDS = (
    150,
    158,
    162,
    165,
    167,
    168,
    164,
    156,
    147,
    136,
    100,
    66,
)  # degrees around the wall where bone ends
_RIB_DROP = (34, 48, 60, 72, 82, 90, 96, 98, 96, 90, 64, 40)  # mm from the vertebra down to the lowest point


class Wall:
    """The chest and abdominal wall: `shell` is the distance outward from its mid-surface in mm (negative
    inside), `angle` the angle around it in degrees, 0 at the spine and 180 at the front.
    """

    def __init__(self, canvas: Canvas) -> None:
        z = canvas.z
        half_width = profile(z, [(row[0], row[1]) for row in _WALL])
        half_depth = profile(z, [(row[0], row[2]) for row in _WALL])
        self.centre_y = profile(z, [(row[0], row[3]) for row in _WALL])
        u, v = canvas.x / half_width, (canvas.y - self.centre_y) / half_depth
        level = (np.abs(u) ** 2.3 + np.abs(v) ** 2.3) ** np.float32(1 / 2.3)
        radius = np.hypot(canvas.x, canvas.y - self.centre_y)
        self.shell: Array = (radius - radius / np.maximum(level, 1e-3)).astype(np.float32)
        self.angle: Array = np.degrees(np.arctan2(np.abs(canvas.x), -(canvas.y - self.centre_y))).astype(np.float32)
        self.half_width, self.half_depth = half_width, half_depth


def outline(canvas: Canvas, wall: Wall) -> None:
    """Paint the body envelope (200): trunk, thighs, neck, head and raised arms."""
    z, h = canvas.z, canvas.habitus
    fat = h.fat_mm * profile(z, _FAT)
    lateral, posterior, anterior = (profile(z, [(row[0], row[i]) for row in _COVER]) for i in (1, 2, 3))
    belly = 1 + 0.35 * profile(z, [(-100, 0), (0, 1), (120, 1), (200, 0)]) * (h.fat_mm / 30)
    half_width = wall.half_width + lateral * h.muscle + fat
    front = wall.half_depth + anterior * h.muscle + fat * belly
    back = wall.half_depth + posterior * h.muscle + 0.7 * fat
    dy = canvas.y - wall.centre_y
    depth = np.where(dy > 0, front, back)
    level = np.abs(canvas.x / half_width) ** 2.4 + np.abs(dy / depth) ** 2.4
    trunk = (level < 1) & (z > -175) & (z < 478)
    thigh_radius = 74 * h.muscle + 0.8 * fat
    leg = np.hypot(np.abs(canvas.x) - 92, (canvas.y + 6) * 0.92) < thigh_radius
    trunk |= leg & (z <= -165)
    neck = (np.hypot(canvas.x, (canvas.y + 8) * 0.95) < 57 + 0.3 * h.fat_mm) & (z > 440) & (z < 600)
    trunk |= neck
    canvas.labels[trunk] = 200
    canvas.ellipsoid(200, (0, 22, 655), (82, 104, 118), over=(0,))
    canvas.ellipsoid(200, (0, 75, 575), (52, 42, 48), over=(0,))
    for side in (-1, 1):
        arm = [(side * 160, -8, 405), (side * 176, -4, 450), (side * 182, 8, 560), (side * 178, 20, 700)]
        canvas.tube(200, arm, [50 + 0.4 * h.fat_mm] * 2 + [40 + 0.4 * h.fat_mm] * 2, over=(0,))
    if h.sex == "female":
        size = 0.7 + h.fat_mm / 50
        for side in (-1, 1):
            canvas.ellipsoid(200, (side * 70, 84, 284), (64 * size, 50 * size, 60 * size), over=(0,))


def bones(canvas: Canvas, wall: Wall) -> None:
    """Paint spine, ribs, sternum, pelvis, femurs, shoulder girdle and skull, with the spinal cord and
    brain.
    """
    from ..anatomy import maisi

    ids = maisi().id
    _spine(canvas, ids)
    _ribs(canvas, wall, ids)
    _pelvis(canvas, ids)
    _shoulders(canvas, wall, ids)
    _head(canvas, ids)


def _spine(canvas: Canvas, ids: Ids) -> None:
    bend = canvas.habitus.bend
    canal = [(0, float(spine_y(z, bend)) - 26 + 4 * (z > 440), z) for z in np.arange(-30, 560, 16.0)]
    canvas.tube(ids("spinal cord"), canal, [7.5 if at[2] < 440 else 7.0 for at in canal])
    canvas.tube(ids("spinal cord"), [canal[-1], (0, -12, 575), (0, 0, 606)], [7, 8, 9])
    for index, (name, z) in enumerate(LEVELS):
        label = ids(name)
        below = LEVELS[index - 1][1] if index else z - 28
        above = LEVELS[index + 1][1] if index + 1 < len(LEVELS) else z + 16
        pitch = (above - below) / 2
        size = float(profile(z, [(-14, 25), (85, 25), (180, 20), (330, 15.5), (430, 14), (540, 11)]))
        y = float(spine_y(z, bend))
        tilt = float(np.degrees(np.arctan2(float(spine_y(z + 8, bend)) - float(spine_y(z - 8, bend)), 16)))
        canvas.ellipsoid(label, (0, y, z), (size, size * 0.74, pitch * 0.43), power=4.5, turn_deg=(-tilt, 0, 0))
        back = y - 26 + 4 * (z > 440)
        canvas.tube(
            label,
            [(0, back, z - pitch * 0.54), (0, back, z + pitch * 0.54)],
            13.0 if z < 440 else 12.0,
            squash=(1.15, 0.95, 1),
        )
        reach = float(profile(z, [(-14, 26), (17, 34), (85, 40), (150, 34), (208, 24), (330, 30), (424, 36), (480, 24)]))
        spike = float(profile(z, [(-14, 18), (85, 30), (180, 26), (330, 22), (442, 26), (520, 16)]))
        fall = float(profile(z, [(85, 6), (180, 12), (300, 26), (400, 18), (480, 8)]))
        for side in (-1, 1):
            canvas.tube(label, [(side * size * 0.6, back + 8, z + 2), (side * reach, back - 2, z)], [6, 4])
        canvas.tube(label, [(0, back - 8, z), (0, back - 10 - spike, z - fall)], [5, 4], squash=(0.8, 1, 1.6))
    sacrum = ids("sacrum")
    canvas.tube(
        sacrum,
        [(0, -16 * bend, -32), (0, -40, -52), (0, -62, -90), (0, -62, -124), (0, -52, -140)],
        [26, 24, 18, 11, 6],
        squash=(1.35, 0.8, 1),
    )
    for side in (-1, 1):
        canvas.ellipsoid(sacrum, (side * 33, -36, -38), (22, 20, 26))


def rib_z(k: int, angle: Array | float) -> Array:
    """Return the height (mm) of rib `k` (1..12) at an angle around the wall; ribs fall from the spine, then
    rise.
    """
    start = LEVELS[17 - (k - 1)][1] + 8
    drop = _RIB_DROP[k - 1]
    fraction = np.asarray(angle, dtype=np.float32) / 150
    return (start - drop * (fraction**1.25) * (1 - 0.18 * np.maximum(fraction - 0.75, 0) * 4)).astype(np.float32)


def _ribs(canvas: Canvas, wall: Wall, ids: Ids) -> None:
    near = (np.abs(wall.shell) < 6.5) & (canvas.z > 20) & (canvas.z < 450) & (canvas.labels == 200)
    at = np.flatnonzero(near)
    shell, angle, z, x = (a.ravel()[at] for a in (wall.shell, wall.angle, canvas.z, canvas.x))
    flat = canvas.labels.reshape(-1)
    coarse = max(canvas.geometry.spacing)
    half_height = max(6.2, 0.62 * coarse)
    half_thick = max(3.6, 0.5 * coarse)
    cartilage = ids("costal cartilages")
    sternum_y = [388.0, 372, 354, 336, 318, 302, 292]
    for k in range(1, 13):
        end = RIB_ENDS[k - 1]
        middle = rib_z(k, angle)
        bone = (np.abs(z - middle) < half_height) & (np.abs(shell) < half_thick) & (angle < end) & (angle > 10)
        for side, word in ((-1, "left"), (1, "right")):
            chosen = bone & (np.sign(x) == side)
            free = flat[at[chosen]] == 200
            flat[at[chosen][free]] = ids(f"{word} rib {k}")
        if k <= 10:
            goal = sternum_y[min(k, 7) - 1]
            start = float(rib_z(k, end))
            goal = goal if k <= 7 else 270 - 14 * (k - 7)
            stop = 172 if k <= 7 else 166 - 4 * (k - 7)
            fraction = np.clip((angle - end) / max(stop - end, 1), 0, 1)
            line = start + (goal - start) * fraction**1.4
            soft = (np.abs(z - line) < half_height) & (np.abs(shell) < half_thick + 0.8) & (angle >= end) & (angle < stop + 1)
            free = soft & (flat[at] == 200)
            flat[at[free]] = cartilage
    sternum = (np.abs(shell) < half_thick + 2) & (angle > 165) & (z > 282) & (z < 412)
    sternum &= np.abs(x) < np.where(z > 370, 27, 17)
    flat[at[sternum & np.isin(flat[at], (200, cartilage))]] = ids("sternum")
    canvas.labels = flat.reshape(canvas.labels.shape)
    for k in range(1, 13):  # head and neck of each rib, from the vertebra to the wall
        _, level = LEVELS[17 - (k - 1)]
        y = float(spine_y(level, canvas.habitus.bend))
        for side, word in ((-1, "left"), (1, "right")):
            back = float(profile(level, [(180, -84), (300, -94), (350, -86), (395, -70), (430, -54)]))
            wide = 46 if k > 2 else 34
            canvas.tube(
                ids(f"{word} rib {k}"),
                [(side * 17, y - 16, level + 7), (side * wide, back + 4, level + 2)],
                [4.5, 5.0],
            )


def _pelvis(canvas: Canvas, ids: Ids) -> None:
    grow = 1.0 if canvas.habitus.sex == "male" else 1.04
    for side, word in ((-1, "left"), (1, "right")):
        s = side * grow
        femur, hip = ids(f"{word} femur"), ids(f"{word} hip")
        head = (s * 90, 4, -108)
        canvas.ellipsoid(femur, head, (23, 23, 23))
        canvas.tube(femur, [head, (s * 112, -6, -124), (s * 128, -12, -132)], [15, 14, 17])
        canvas.tube(
            femur,
            [(s * 128, -12, -116), (s * 126, -8, -165), (s * 116, 2, -260), (s * 104, 8, -420)],
            [15, 17, 14.5, 14],
        )
        crest = [
            (52, -66, 4),
            (66, -60, 22),
            (84, -44, 36),
            (103, -22, 44),
            (117, 4, 42),
            (123, 26, 30),
            (118, 44, 10),
            (110, 46, -16),
        ]
        for (cx, cy, cz), (nx, ny, nz) in pairwise(crest):
            for f in (0.0, 0.5):
                tip = (s * (cx + f * (nx - cx)), cy + f * (ny - cy), cz + f * (nz - cz))
                canvas.tube(hip, [tip, (s * 84, -4 + 0.12 * cy, -72)], [7.0, 9.0])
        canvas.tube(hip, [(s * c[0], c[1], c[2]) for c in crest], 7.5)
        canvas.tube(hip, [(s * 48, -56, -2), (s * 58, -52, -34), (s * 76, -30, -62)], [10, 11, 13])
        canvas.ellipsoid(hip, (s * 88, 2, -102), (33, 34, 34), where=(np.abs(canvas.x) < 104).astype(np.float32))
        canvas.tube(hip, [(s * 74, 26, -100), (s * 42, 44, -112), (s * 10, 46, -126)], [11, 9, 11])
        canvas.tube(hip, [(s * 80, -18, -118), (s * 66, -34, -150), (s * 60, -34, -162)], [17, 15, 13])
        canvas.tube(hip, [(s * 60, -30, -164), (s * 34, 12, -150), (s * 10, 40, -136)], [10, 7, 9])


def _shoulders(canvas: Canvas, wall: Wall, ids: Ids) -> None:
    coarse = max(canvas.geometry.spacing)
    for side, word in ((-1, "left"), (1, "right")):
        canvas.tube(
            ids(f"{word} clavicula"),
            [(side * 20, 58, 404), (side * 70, 52, 424), (side * 112, 26, 434), (side * 142, 2, 432)],
            [8, 6.5, 6.5, 7],
        )
        canvas.ellipsoid(ids(f"{word} humerus"), (side * 168, -8, 412), (23, 23, 24))
        canvas.tube(
            ids(f"{word} humerus"),
            [(side * 170, -8, 412), (side * 182, 0, 500), (side * 184, 14, 700)],
            [16, 12, 12],
        )
        blade = (wall.shell > 9) & (wall.shell < 10 + max(6.0, coarse * 1.2)) & (canvas.z > 296) & (canvas.z < 418)
        reach = 24 + 44 * np.clip((canvas.z - 296) / 90, 0, 1)
        blade &= (wall.angle > 38) & (wall.angle < 38 + reach) & (np.sign(canvas.x) == side)
        whole = (slice(0, blade.shape[0]), slice(0, blade.shape[1]), slice(0, blade.shape[2]))
        canvas.paint(ids(f"{word} scapula"), blade, whole)
        canvas.tube(
            ids(f"{word} scapula"),
            [(side * 96, -74, 388), (side * 130, -44, 408), (side * 146, -14, 412)],
            [7, 9, 14],
        )
        canvas.tube(
            ids(f"{word} scapula"),
            [(side * 66, -86, 372), (side * 112, -74, 414), (side * 148, -22, 438)],
            [5, 6, 7],
        )


def _head(canvas: Canvas, ids: Ids) -> None:
    canvas.ellipsoid(ids("brain"), (0, 20, 668), (66, 84, 68), rough=0.01)
    canvas.ellipsoid(ids("brain"), (0, -30, 612), (46, 34, 30))
    canvas.ellipsoid(ids("skull"), (0, 20, 666), (73, 92, 77))
    canvas.ellipsoid(ids("skull"), (0, -28, 608), (54, 42, 38))
    jaw = [
        (-48, 22, 600),
        (-46, 34, 562),
        (-26, 84, 546),
        (0, 96, 544),
        (26, 84, 546),
        (46, 34, 562),
        (48, 22, 600),
    ]
    canvas.tube(ids("skull"), jaw, 8)
    canvas.tube(ids("skull"), [(-42, 66, 612), (0, 96, 606), (42, 66, 612)], 9)
