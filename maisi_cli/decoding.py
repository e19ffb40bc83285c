"""From a latent to an image: the VAE's decoder on the whole volume, in slabs, or on overlapping windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import streaming
from .catalog import modality as find_modality
from .errors import Rejected, UsageError
from .estimates import windows
from .events import OnEvent, Step, ignore
from .networks import Networks


def decode(
    networks: Networks, latent: Tensor, *, decoder: str = "exact", sweeps: str = "store", window: Sequence[int] | None = None,
    overlap: float = 0.4, on_event: OnEvent = ignore,
) -> Tensor:  # fmt: skip
    """Decode a latent (1, C, x, y, z) to intensities (1, 1, 4x, 4y, 4z) in float32 on the CPU; the latent is divided by the scale.

    `exact` gives what decoding the whole volume at once gives, slab by slab; `sweeps` is a mode of
    `streaming.MODES`: what it holds at full resolution. `window` decodes windows of `window` latent voxels that overlap by the share
    `overlap`, blended with a Gaussian; every window has GroupNorm statistics of its own, so seams can show. Raises
    `UsageError` for a window that is not positive or an overlap outside [0, 1).
    """
    parts = _parts(networks, latent, decoder, sweeps, window, overlap, on_event)
    return _assembled((part.float() for part in parts), latent)


def decode_image(
    networks: Networks, latent: Tensor, modality: str, *, decoder: str = "exact", sweeps: str = "store",
    window: Sequence[int] | None = None, overlap: float = 0.4, on_event: OnEvent = ignore,
) -> NDArray[np.int16]:  # fmt: skip
    """Decode a latent (1, C, x, y, z) to the numbers of an image file: int16 (4x, 4y, 4z), HU (CT) or MR units, halves rounded to even.

    Every slab is rescaled and rounded where it was decoded, so `exact` holds no volume in float32; windows and engines make one, on the
    device. Options are those of `decode`.
    Raises `Rejected` where the decoder gives a value that is not finite, and what `decode` raises.
    """

    def stored(part: Tensor) -> Tensor:
        if not bool(torch.isfinite(part).all()):
            raise Rejected("the decoder gave values that are not finite", hint="use --dtype fp32")
        return to_units(part.float(), modality).round_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)

    parts = _parts(networks, latent, decoder, sweeps, window, overlap, on_event)
    made: NDArray[np.int16] = _assembled(map(stored, parts), latent)[0, 0].numpy()
    return made


def _parts(
    networks: Networks, latent: Tensor, decoder: str, sweeps: str, window: Sequence[int] | None, overlap: float, on_event: OnEvent
) -> Iterator[Tensor]:
    """Yield the image's intensities (1, 1, n, 4y, 4z) along x, on the device: in slabs, or all at once."""
    z = (latent.to(networks.device) / networks.scale_factor).to(networks.precision.dtype)
    vae, engine = networks.parts["vae"], networks.engines.get("decoder")

    def call(part: Tensor) -> Tensor:
        with torch.inference_mode():
            made: Tensor = engine(z=part) if engine else vae.decode_stage_2_outputs(part)  # type: ignore[operator]
        return made.float()

    def on_step(done: int, total: int) -> None:
        on_event(Step(stage="decode", done=done, total=total))

    if decoder == "exact" and engine is not None:
        yield call(z)
    elif decoder == "exact":
        yield from streaming.decoded(vae, z, mode=sweeps, on_step=on_step)
    elif decoder != "window":
        raise UsageError(f"there is no decoder {decoder!r}", hint="use --decoder auto, exact or window")
    elif window is None or min(window) < 1:
        raise UsageError("the window decoder needs a window in latent voxels", hint="add --window 64x64x48")
    elif not 0 <= overlap < 1:
        raise UsageError(f"overlap is {overlap:g}", hint="use a share from 0 to below 1, such as --overlap 0.4")
    else:
        yield decode_window(call, z, window, overlap, on_event=on_event)


def _assembled(parts: Iterator[Tensor], latent: Tensor) -> Tensor:
    """Return parts that follow each other along x as one volume on the CPU."""
    made: Tensor | None = None
    done = 0
    for part in parts:
        if made is None:
            factor = part.shape[3] // latent.shape[3]
            made = torch.empty((*part.shape[:2], *(n * factor for n in latent.shape[2:])), dtype=part.dtype)
        made[:, :, done : done + part.shape[2]] = part.cpu()
        done += part.shape[2]
    assert made is not None
    return made


def decode_window(call, z: Tensor, window: Sequence[int], overlap: float, *, on_event: OnEvent = ignore) -> Tensor:  # type: ignore[no-untyped-def]
    """Blend `call(part)` over windows of the latent as MONAI's `SlidingWindowInferer` does (Gaussian, sigma 0.125)."""
    from monai.inferers.inferer import SlidingWindowInferer

    roi = [min(int(w), int(n)) for w, n in zip(window, z.shape[2:], strict=True)]
    total = windows(z.shape[2:], roi, overlap)
    done = 0

    def counted(part: Tensor) -> Tensor:
        nonlocal done
        made: Tensor = call(part)
        done += 1
        on_event(Step(stage="decode", done=min(done, total), total=total))
        return made

    inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=1, overlap=overlap, mode="gaussian", padding_mode="constant",
                                   progress=False, sw_device=z.device, device=z.device)  # fmt: skip
    with torch.inference_mode():  # the inferer blends in place into what `call` returns
        return inferer(z, counted).float()  # type: ignore[union-attr, arg-type]


def reference_decoder(latent_size: Sequence[int], window: Sequence[int]) -> str:
    """Return which decoder the reference uses: whole when the latent has no more voxels than the window."""
    return "exact" if int(np.prod(latent_size)) <= int(np.prod(window)) else "window"


def check_splits(size_y: int, splits: int) -> None:
    """Refuse a number of splits along Y that would drop rows or crash: it must divide, with slabs of 3 rows or more.

    `size_y` is the latent's extent, the smallest of the VAE's levels. Raises `UsageError` naming the valid numbers.
    """

    def valid(n: int) -> bool:
        return n == 1 or (size_y % n == 0 and size_y // n >= 3)

    if splits < 1 or not valid(splits):
        allowed = [n for n in (1, 2, 4, 8, 16) if valid(n)]
        raise UsageError(f"{splits} splits do not divide a latent of {size_y} rows into slabs of at least 3",
                         hint=f"use --splits {', '.join(map(str, allowed))}")  # fmt: skip


def to_units(intensity: Tensor, modality: str) -> Tensor:
    """Return intensities as HU (CT: [0, 1] to [-1000, 1000], clipped) or MR units (times 1000, clipped at 0 below)."""
    if find_modality(modality).kind == "ct":
        return intensity.clamp(0, 1).mul_(2000).sub_(1000)
    return intensity.clamp(min=0).mul_(1000)


def to_hu(intensity: Tensor, modality: str) -> NDArray[np.float32]:
    """Return intensities (1, 1, X, Y, Z) in the units of `to_units`, as an array (X, Y, Z) of float32."""
    made: NDArray[np.float32] = to_units(intensity[0, 0].float().cpu(), modality).numpy()
    return made
