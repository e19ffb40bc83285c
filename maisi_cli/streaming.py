"""Exact decoding and encoding in slabs: the whole volume's result, with a few planes of it in memory.

A network of MONAI's MAISI autoencoder is cut into steps at its group norms. Slabs of planes run through them along x: a
convolution keeps the two planes that it still needs, so that every plane of every layer is computed once a sweep and
nothing is computed twice at borders. Group norms need statistics over the whole volume; a sweep gathers them where they
arise, and the next one applies them. Results differ from those of the whole volume at once by rounding alone.

What is stored between sweeps decides memory against time (`MODES`): every step's result (each step runs once), one tensor
at full resolution, or none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import kernels
from .estimates import SWEEPS, thickness
from .kernels import LAYOUT, Affine, Moments, convolution, joined

MODES = SWEEPS
"""What a sweep leaves at full resolution: the result of every step, of the first residual block, or nothing."""
Slab = tuple[Tensor, ...]
"""Some planes (1, C, planes, Y, Z): of a layer, and of the shortcut beside it within a residual block."""


@dataclass(slots=True)
class Scratch:
    """Memory that convolutions read from, used again by the next: on a processor new memory costs as much as the work done in it."""

    held: list[Tensor] = field(default_factory=list)

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a volume in `LAYOUT` with anything in it, of the dtype and on the device of `like`."""
        if like.device.type != "cpu":  # CUDA's allocator does this itself
            return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAYOUT)
        count = math.prod(shape)
        fits = [k for k, flat in enumerate(self.held) if flat.numel() >= count]
        flat = self.held.pop(fits[0]) if fits else torch.empty(count, dtype=like.dtype)
        rows = flat[:count].view(shape[0], *shape[2:], shape[1])
        return rows.permute(0, 4, 1, 2, 3)

    def give(self, volume: Tensor) -> None:
        """Take a volume back that `take` returned, and that nothing reads any more; two are kept."""
        if volume.device.type == "cpu":
            self.held.append(torch.empty(0, dtype=volume.dtype).set_(volume.untyped_storage()))  # type: ignore[call-overload]
            self.held = sorted(self.held, key=torch.numel)[-2:]


@dataclass(frozen=True, slots=True)
class Stream:
    """Slabs that follow one another along x, `planes` in all."""

    slabs: Iterator[Slab]
    planes: int
    scratch: Scratch = field(default_factory=Scratch)

    def followed(self, slabs: Iterator[Slab], planes: int | None = None) -> Stream:
        """Return what this stream has become."""
        return Stream(slabs, self.planes if planes is None else planes, self.scratch)


OnStep = Callable[[int, int], None]
Run = Callable[[Stream, Affine | None], Stream]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of a network: the group norm that it begins with, if any, and what it does to a stream.

    `level` counts the changes of resolution before its result, `channels` what a slab of that holds; `ends_block` says
    that the result is that of a residual block.
    """

    run: Run
    channels: int
    norm: nn.GroupNorm | None = None
    silu: bool = True
    level: int = 0
    ends_block: bool = False


# --- layers of a stream ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Queue:
    """Planes that wait until what runs beside them has caught up."""

    held: deque[Tensor] = field(default_factory=deque)

    def take(self, planes: int) -> Tensor:
        """Return the next planes."""
        return joined(self.parts(planes))

    def parts(self, planes: int) -> list[Tensor]:
        """Return the next planes as they came."""
        parts: list[Tensor] = []
        while planes:
            first = self.held.popleft()
            if first.shape[2] > planes:
                self.held.appendleft(first[:, :, planes:])
                first = first[:, :, :planes]
            parts.append(first)
            planes -= first.shape[2]
        return parts


def _bordered(stream: Stream, affine: Affine | None, edge: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Yield the main planes of each slab, normalised first where `affine` says so, with the plane before and the plane after.

    At the ends of the volume these are what `edge` makes of the outermost plane. What has no plane after it yet waits. What is yielded
    is to be given back to the stream's scratch.
    """
    kept: Tensor | None = None
    seen = 0
    for x, *_ in stream.slabs:
        seen += x.shape[2]
        before, after = 1 if kept is None else kept.shape[2], int(seen == stream.planes)
        shape = (*x.shape[:2], before + x.shape[2] + after, *x.shape[3:])
        wide = stream.scratch.take(shape, x)
        inner = wide[:, :, before : before + x.shape[2]]
        if affine:
            affine.into(x, inner)
        else:
            inner.copy_(x)
        wide[:, :, :before] = edge(inner[:, :, :1]) if kept is None else kept
        if after:
            wide[:, :, -1:] = edge(inner[:, :, -1:])
        kept = wide[:, :, -2:].clone()
        del x, inner
        box = [wide]
        del wide
        if shape[2] >= 3:
            yield box.pop()  # nothing here holds on to what is consumed elsewhere
        else:
            stream.scratch.give(box.pop())


def convolved(stream: Stream, conv: nn.Module, affine: Affine | None = None, *, beside: Queue | None = None) -> Stream:
    """Run a convolution of 3 x 3 x 3 with a border of zeros over the main planes, normalised first where `affine` says so.

    What waits `beside` is added.
    """

    def go() -> Iterator[Slab]:
        for x in _bordered(stream, affine, torch.zeros_like):
            added = beside.parts(x.shape[2] - 2) if beside else []
            made = [convolution(x, conv, padding=(0, 1, 1), beside=added)]
            stream.scratch.give(x)
            del x, added
            yield (made.pop(),)

    return stream.followed(go())


def halved(stream: Stream, conv: nn.Module, *, low: int = 0) -> Stream:
    """Run a convolution of 3 x 3 x 3 of stride 2 after zeros: `low` planes, rows and columns at the low ends, one at the high ends."""

    def go() -> Iterator[Slab]:
        kept: Tensor | None = None
        seen = 0
        for x, *_ in stream.slabs:
            seen += x.shape[2]
            last = seen == stream.planes
            x = functional.pad(x, (low, 1, low, 1, low if kept is None else 0, int(last)))
            x = x if kept is None else torch.cat([kept, x], dim=2)
            made = (x.shape[2] - 1) // 2
            kept = x[:, :, 2 * made :].clone()
            if made:
                yield (functional.conv3d(x[:, :, : 2 * made + 1], conv.weight, conv.bias, stride=2),)  # type: ignore[arg-type]

    return stream.followed(go(), (stream.planes + low - 2) // 2 + 1)


def activated(stream: Stream) -> Stream:
    """Run SiLU, in place."""
    return stream.followed((functional.silu(x, inplace=True),) for x, *_ in stream.slabs)


def doubled(stream: Stream) -> Stream:
    """Interpolate to twice the resolution as `interpolate(scale_factor=2, mode="trilinear")` does, borders included."""

    def go() -> Iterator[Slab]:
        for x in _bordered(stream, None, lambda plane: plane):
            made = [kernels.doubled(x)]
            stream.scratch.give(x)
            del x
            yield (made.pop(),)

    return stream.followed(go(), 2 * stream.planes)


def transposed(stream: Stream, conv: nn.Module) -> Stream:
    """Run a transposed convolution of 3 x 3 x 3, stride 2, padding 1 and output padding 1: twice the resolution."""

    def go() -> Iterator[Slab]:
        kept: Tensor | None = None
        seen = 0
        for x, *_ in stream.slabs:
            seen += x.shape[2]
            last = seen == stream.planes
            x = x if kept is None else torch.cat([kept, x], dim=2)
            made = x.shape[2] if last else x.shape[2] - 1  # the odd plane after a plane needs the one behind it
            kept = x[:, :, -1:].clone()
            if made:
                y = functional.conv_transpose3d(x, conv.weight, conv.bias, stride=2, padding=1, output_padding=1)  # type: ignore[arg-type]
                yield (y[:, :, : 2 * made],)

    return stream.followed(go(), 2 * stream.planes)


def whole(stream: Stream, module: nn.Module) -> Stream:
    """Run a module that needs all planes at once, such as attention at the resolution of the latent."""

    def go() -> Iterator[Slab]:
        slabs = list(stream.slabs)
        made = module(torch.cat([x for x, *_ in slabs], dim=2))
        yield from ((part,) for part in made.split(max(1, slabs[0][0].shape[2]), dim=2))

    return stream.followed(go())


def first_half(stream: Stream, block: Any, affine: Affine | None) -> Stream:
    """Run a residual block up to its first convolution; the shortcut goes beside it."""
    queue = Queue()
    shortcut = conv_of(block.nin_shortcut) if block.in_channels != block.out_channels else None

    def tapped() -> Iterator[Slab]:
        for x, *_ in stream.slabs:
            queue.held.append(x if shortcut is None else convolution(x, shortcut))
            yield (x,)

    def go() -> Iterator[Slab]:
        for x, *_ in convolved(stream.followed(tapped()), conv_of(block.conv1), affine).slabs:
            yield x, queue.take(x.shape[2])

    return stream.followed(go())


def second_half(stream: Stream, block: Any, affine: Affine | None) -> Stream:
    """Run a residual block from its second norm to its end, where the shortcut is added."""
    queue = Queue()

    def tapped() -> Iterator[Slab]:
        for x, beside in stream.slabs:
            queue.held.append(beside)
            yield (x,)

    return convolved(stream.followed(tapped()), conv_of(block.conv2), affine, beside=queue)


# --- networks as steps -----------------------------------------------------------------------------------------


def conv_of(module: Any) -> nn.Module:
    """Return the convolution within MONAI's wrappers of it."""
    while not isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        module = module.conv
    return module


def steps_of(blocks: Iterable[nn.Module]) -> list[Step]:
    """Return the blocks of a MAISI encoder or decoder as steps, each at its level of resolution."""
    from monai.apps.generation.maisi.networks import autoencoderkl_maisi as maisi

    found: list[Step] = []
    level = channels = 0
    norm: nn.GroupNorm | None = None
    for block in blocks:
        if isinstance(block, maisi.MaisiResBlock):
            channels = int(block.out_channels)
            found.append(Step(norm=block.norm1, run=_half(first_half, block), level=level, channels=2 * channels))
            found.append(Step(norm=block.norm2, run=_half(second_half, block), level=level, channels=channels, ends_block=True))
        elif isinstance(block, nn.GroupNorm):
            norm = block
        elif isinstance(block, (maisi.MaisiUpsample, maisi.MaisiDownsample, maisi.MaisiConvolution)):
            conv = conv_of(block)
            channels = int(conv.out_channels)  # type: ignore[arg-type]
            level += not isinstance(block, maisi.MaisiConvolution)
            found.append(Step(norm=norm, silu=False, run=_layer(block, conv), level=level, channels=channels))
            norm = None
        else:
            found.append(Step(run=_whole(block), level=level, channels=channels))
    return found


def _half(half: Callable[[Stream, Any, Affine | None], Stream], block: nn.Module) -> Run:
    return lambda stream, affine: half(stream, block, affine)


def _layer(block: nn.Module, conv: nn.Module) -> Run:
    if hasattr(block, "pad"):
        return lambda stream, _: halved(stream, conv)
    if getattr(block, "use_convtranspose", False):
        return lambda stream, _: transposed(stream, conv)
    if hasattr(block, "use_convtranspose"):
        return lambda stream, _: convolved(doubled(stream), conv)
    return lambda stream, affine: convolved(stream, conv, affine)


def _whole(block: nn.Module) -> Run:
    return lambda stream, _: whole(stream, block)


# --- sweeps ----------------------------------------------------------------------------------------------------


def run(
    steps: Sequence[Step], source: Tensor, *, keep: Callable[[Step], bool], planes: Callable[[Step], int], on_step: OnStep | None = None
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the network's result for the planes of `source` (1, C, X, Y, Z), slab after slab along x.

    `keep` says after which steps the result is stored for the next sweeps, `planes` how many planes a slab of it has;
    `on_step(done, total)` is told after each step.
    """
    if len(source) != 1:
        raise ValueError(f"a batch of {len(source)} volumes has statistics of its own for each: stream one at a time")
    stored: list[Slab] = [(part,) for part in source.split(planes(steps[0]), dim=2)]
    total = source.shape[2]
    pending: list[tuple[Step, Affine | None]] = []
    known: Moments | None = None
    scratch = Scratch()

    def sweep(slabs: Iterator[Slab]) -> Iterator[Slab]:
        return _sweep(pending, Stream(slabs, total, scratch), planes)

    for number, step in enumerate(steps):
        affine = None
        if step.norm is not None:
            if known is None or pending:
                known = Moments()
                for x, *_ in sweep(iter(stored)):
                    known.add(x)
            affine = known.affine(step.norm, silu=step.silu)
        pending.append((step, affine))
        known = None
        if keep(step) and number + 1 < len(steps):
            known = Moments() if steps[number + 1].norm is not None else None
            made: list[Slab] = []
            for slab in sweep(_consumed(stored)):
                if known is not None:
                    known.add(slab[0])
                made += _cut(slab, planes(step))
            stored, pending = made, []
            total = sum(x.shape[2] for x, *_ in stored)
        if on_step:
            on_step(number + 1, len(steps))
    yield from (x for x, *_ in sweep(_consumed(stored)))


def _sweep(pending: Sequence[tuple[Step, Affine | None]], stream: Stream, planes: Callable[[Step], int]) -> Iterator[Slab]:
    for step, affine in pending:
        stream = step.run(stream, affine)
        stream = stream.followed(_thinned(stream.slabs, planes(step)))
    return stream.slabs


def _thinned(slabs: Iterator[Slab], planes: int) -> Iterator[Slab]:
    """Yield slabs that are not much thicker than `planes`: at its end every convolution lets one more plane go than came."""
    for slab in slabs:
        if slab[0].shape[2] <= 3 * planes // 2:
            yield slab
        else:
            yield from zip(*(x.split(planes, dim=2) for x in slab), strict=True)


def _consumed(stored: list[Slab]) -> Iterator[Slab]:
    """Yield stored slabs, and let each go once the next is asked for."""
    stored.reverse()
    while stored:
        yield stored.pop()


def _cut(slab: Slab, planes: int) -> list[Slab]:
    if slab[0].shape[2] <= planes:
        return [slab]
    return [tuple(part.clone() for part in parts) for parts in zip(*(x.split(planes, dim=2) for x in slab), strict=True)]


def kept_in(mode: str, full: Callable[[Step], int]) -> Callable[[Step], bool]:
    """Return which steps are stored in a mode, where `full` says how many halvings a step's result is from full resolution.

    `recompute` stores nothing at full resolution, and one above it the results of residual blocks alone: what an upsampling
    makes there has twice their channels.
    """
    if mode == "store":
        return lambda step: True
    if mode == "half":
        return lambda step: full(step) > 0 or step.ends_block
    return lambda step: full(step) > 1 or (full(step) == 1 and step.ends_block)


def _planes(channels: int, like: Tensor, y: int, z: int, mode: str) -> int:
    return thickness(channels, y, z, itemsize=like.dtype.itemsize, device=like.device.type, mode=mode)


@torch.inference_mode()
def decoded(vae: Any, latent: Tensor, *, mode: str = "store", planes: int | None = None, on_step: OnStep | None = None) -> Iterator[Tensor]:
    """Yield the decoded planes of a latent (1, C, x, y, z), in order along x; each slab is (1, out, planes, 4y, 4z).

    `planes` is the thickness of slabs at full resolution; weights are in the dtype of the latent. Raises `ValueError` for a mode
    that is not in `MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r} of {', '.join(MODES)}")
    steps = steps_of(vae.decoder.blocks)
    finest = steps[-1].level
    widest = max(step.channels for step in steps if step.level == finest)
    y, z = (n << finest for n in latent.shape[3:])
    deep = planes or _planes(widest, latent, y, z, mode)
    first = conv_of(vae.post_quant_conv)
    source = functional.conv3d(latent.contiguous(memory_format=LAYOUT), first.weight, first.bias)  # type: ignore[arg-type]
    keep = kept_in(mode, lambda step: finest - step.level)
    yield from run(steps, source, keep=keep, planes=lambda step: max(1, deep >> (finest - step.level)), on_step=on_step)


def encoded(vae: Any, image: Tensor, *, mode: str = "store", planes: int | None = None) -> Tensor:
    """Return the mean of the latent of an image (1, 1, X, Y, Z), as encoding the whole image at once gives it."""
    return _encoded(vae, image, [vae.quant_conv_mu], mode, planes)[0]


def posterior(vae: Any, image: Tensor, *, mode: str = "store", planes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latent of an image (1, 1, X, Y, Z), the latter from exp(-15) to exp(10), as MONAI does."""
    mean, log_variance = _encoded(vae, image, [vae.quant_conv_mu, vae.quant_conv_log_sigma], mode, planes)
    return mean, torch.exp(log_variance.float().clamp(-30, 20) / 2)


@torch.inference_mode()
def _encoded(vae: Any, image: Tensor, heads: Sequence[Any], mode: str, planes: int | None) -> list[Tensor]:
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r} of {', '.join(MODES)}")
    steps = steps_of(vae.encoder.blocks)
    widest = max(step.channels for step in steps if step.level == 0)
    deep = planes or _planes(widest, image, image.shape[3], image.shape[4], mode)
    source = image.contiguous(memory_format=LAYOUT)
    slabs = run(steps, source, keep=kept_in(mode, lambda step: step.level), planes=lambda step: max(1, deep >> step.level))
    convs = [conv_of(head) for head in heads]
    parts = [[functional.conv3d(slab, conv.weight, conv.bias) for conv in convs] for slab in slabs]  # type: ignore[arg-type]
    return [torch.cat(part, dim=2) for part in zip(*parts, strict=True)]


Bits = Callable[..., Tensor]


@torch.inference_mode()
def embedded(
    embedding: Any, labels: Tensor, bits: Bits, *, dtype: torch.dtype, planes: int | None = None, device: str | None = None
) -> Tensor:
    """Return what a ControlNet's condition encoder makes of labels (1, 1, X, Y, Z) uint8, turned to `bits` slab by slab.

    `device` is a kind of device that slabs are made for, if not that of the labels.
    """
    convolutions = [conv_of(embedding.conv_in), *map(conv_of, embedding.blocks), conv_of(embedding.conv_out)]
    widest = max(int(conv.in_channels) for conv in convolutions[:3])  # type: ignore[arg-type]
    y, z = labels.shape[3:]
    deep = planes or thickness(widest, y, z, itemsize=dtype.itemsize, device=device or labels.device.type)
    slabs = ((bits(part, dtype=dtype).contiguous(memory_format=LAYOUT),) for part in labels.split(deep, dim=2))
    stream = Stream(slabs, labels.shape[2])
    for conv in convolutions[:-1]:
        strided = conv.stride[0] == 2  # type: ignore[index]
        stream = activated(halved(stream, conv, low=1) if strided else convolved(stream, conv))
    return torch.cat([x for x, *_ in convolved(stream, convolutions[-1]).slabs], dim=2)
