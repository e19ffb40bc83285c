"""What networks hold and compute, found by running the real modules without memory: on torch's device `meta`.

The functions at the end trace each stage of `generate` and of training, and the reference's decoder.

`Trace` counts live bytes, floating-point operations and bytes moved; `Autocast` applies CUDA autocast's rules to what MONAI's
own modules call, as they run in the reference. No weights, no GPU and no data are needed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count

from . import inference, networks, streaming
from .catalog import ModelSpec, NetworkSpec
from .estimates import TRAINING_GIB, Figures, slab_planes
from .fast_training import trainable
from .geometry import Size
from .kernels import LAYOUT
from .planning import Plan
from .settings import GenerateSettings

GIB = 2**30
META = torch.device("meta")
BLOCK = 512
"""Bytes that torch's allocator rounds up to."""

Workspace = Callable[[Any, list[Tensor], list[Tensor]], int]


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


class Trace(TorchDispatchMode):
    """Counts inside a `with` block: `live` and `peak` bytes of storages, `flops`, and `moved` bytes read and written.

    `workspace(operation, inputs, outputs)` gives the bytes that an operation takes while it runs. Tensors that exist
    before the block count from their first use on.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.attention_flops = self.moved = self.launches = 0
        self.workspace = workspace
        self._known: dict[int, int] = {}

    def hold(self, *networks: nn.Module) -> None:
        """Count the weights of networks, which are there all the time."""
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._track(tensor)
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in before]
        for tensor in made:
            self._track(tensor)
        if made or func._schema.is_mutable:
            self.launches += 1
            self.moved += sum(map(size_of, {id(tensor): tensor for tensor in (*inputs, *made)}.values()))
            attention, count = _operations(func, args, kwargs, inputs, out)
            self.flops += count
            self.attention_flops += count if attention else 0
        extra = self.workspace(func, inputs, made) if self.workspace else 0
        self.peak = max(self.peak, self.live + extra)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = size
        self.live += size
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.conv3d, torch.ops.aten.conv_transpose3d}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention


def _operations(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Any) -> tuple[bool, int]:
    """Return whether an operation is attention, and how many floating-point operations it is (a product and a sum are two)."""
    packet = func._overloadpacket
    if packet is _ATTENTION:
        return True, int(sdpa_flop_count(*(tensor.shape for tensor in inputs[:3])))
    if packet in _CONVOLUTIONS and packet not in flop_registry:
        transposed = packet is torch.ops.aten.conv_transpose3d
        return False, int(conv_flop_count(list(inputs[0].shape), list(inputs[1].shape), list(out.shape), transposed=transposed))
    if packet in flop_registry:
        return "attention" in str(func), int(flop_registry[packet](*args, **kwargs, out_val=out))
    return False, 0


def transformed(func: Any, inputs: list[Tensor], made: list[Tensor]) -> int:
    """Return what a convolution of volumes that are not channels-last takes: both sides in another layout, and a contiguous copy.

    cuDNN computes in NHWC; input and output are copied into it and back.
    """
    if func._overloadpacket not in _CONVOLUTIONS or inputs[0].dim() != 5 or not made:
        return 0
    if not inputs[0].is_contiguous() and inputs[0].is_contiguous(memory_format=LAYOUT):
        return 0
    copied = 0 if inputs[0].is_contiguous() else size_of(inputs[0])
    return size_of(inputs[0]) + size_of(made[0]) + copied


_HALF = {functional.conv3d, torch.conv3d, functional.conv_transpose3d, torch.conv_transpose3d, functional.linear, torch.matmul, torch.bmm,
         torch.baddbmm, torch.einsum, functional.scaled_dot_product_attention}  # fmt: skip
_FULL = {functional.interpolate, functional.group_norm, torch.group_norm, functional.layer_norm, torch.layer_norm, functional.softmax,
         torch.softmax, torch.Tensor.softmax, torch.sum, torch.Tensor.sum}  # fmt: skip


class Autocast(TorchFunctionMode):
    """CUDA autocast to float16 as torch's table has it (ATen/autocast_mode.h), for the functions that these networks call.

    The table interpolates in float32, except where modules leave autocast for it. Weights that were cast are kept, as autocast
    keeps them.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, *, interpolates: bool = True) -> None:
        super().__init__()
        self.dtype = dtype
        self.full = _FULL if interpolates else _FULL - {functional.interpolate}
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and torch.is_grad_enabled():
            inputs = [*args, *(kwargs[key] for key in ("query", "key", "value")[len(args) :])][:3]
            return _FusedAttention.apply(*(self._cast(each, self.dtype) for each in inputs))
        to = self.dtype if func in _HALF else torch.float32 if func in self.full else None
        if to is not None:
            args = tuple(self._cast(each, to) for each in args)
            kwargs = {key: self._cast(each, to) for key, each in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, to: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(each, to) for each in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == to:
            return value
        if isinstance(value, nn.Parameter):
            if id(value) not in self._weights:
                self._weights[id(value)] = value.detach().to(to)
            return self._weights[id(value)]
        return value.to(to)


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps for its backward pass: inputs and output, and never the matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


# --- stages ---------------------------------------------------------------------------------------------------------


def _figures(trace: Trace, more: int = 0) -> Figures:
    return Figures(peak_gib=(trace.peak + more) / GIB, tflop=trace.flops / 1e12, attention_tflop=trace.attention_flops / 1e12,
                   moved_gb=trace.moved / 1e9)  # fmt: skip


def _built(spec: NetworkSpec, *, fast: bool = True) -> nn.Module:
    with META:
        return networks.build(spec, fast=fast)


def _ready(spec: NetworkSpec, dtype: torch.dtype) -> nn.Module:
    return inference.laid_out(_built(spec).eval().requires_grad_(False), dtype, META)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def denoise_step(spec: ModelSpec, latent: Sequence[int], dtype: torch.dtype, *, paired: bool) -> Figures:
    """Trace one step of the diffusion model as `Networks.denoiser` makes it."""
    parts = {name: _ready(spec.networks[name], dtype) for name in ("unet", *(["controlnet"] if paired else []))}
    precision = networks.Precision(name="traced", dtype=dtype)
    nets = networks.Networks(spec=spec, parts=parts, scale_factor=1.0, device=META, precision=precision, cuda_graphs=False)
    size = [n * spec.latent_factor for n in latent]
    labels = _empty(1, 1, *size, dtype=torch.uint8) if paired else None
    condition = networks.Condition(spacing_mm=(1.0, 1.0, 1.0), top_region=1, bottom_region=2, labels=labels)
    denoise = nets.denoiser(condition)
    x, t = _empty(1, spec.latent_channels, *latent), _empty()
    with torch.inference_mode(), Trace() as trace:
        trace.hold(*parts.values())
        denoise(x, t)
    return _figures(trace)


def embedding(spec: ModelSpec, size: Size, dtype: torch.dtype, *, device: str) -> Figures:
    """Trace the embedding of a mask for the ControlNet, once for a sample."""
    controlnet: Any = _ready(spec.networks["controlnet"], dtype)
    with torch.inference_mode(), Trace() as trace:
        trace.hold(controlnet)
        labels = _empty(1, 1, *size, dtype=torch.uint8)
        streaming.embedded(controlnet.controlnet_cond_embedding, labels, networks.binarise, dtype=dtype, device=device)
    return _figures(trace)


def decode(spec: ModelSpec, size: Size, dtype: torch.dtype, *, device: str, mode: str, part: str = "vae") -> Figures:
    """Trace the exact decoder for a volume, as it runs on a kind of device."""
    vae = _ready(spec.networks[part], dtype)
    planes = slab_planes(spec.networks[part], size, itemsize=dtype.itemsize, device=device, mode=mode)
    with torch.inference_mode(), Trace() as trace:
        trace.hold(vae)
        z = _empty(1, spec.latent_channels, *(n // spec.latent_factor for n in size), dtype=dtype)
        for slab in streaming.decoded(vae, z, mode=mode, planes=planes):
            del slab
    return _figures(trace)


def mask_step(spec: ModelSpec, dtype: torch.dtype) -> Figures:
    """Trace one step of the diffusion model for masks."""
    unet = _ready(spec.networks["mask_unet"], dtype)
    latent = spec.scheduler.get("latent_size", (64, 64, 64))
    with torch.inference_mode(), Trace() as trace:
        trace.hold(unet)
        unet(_empty(1, spec.latent_channels, *latent, dtype=dtype), timesteps=_empty(1), context=_empty(1, 1, 10, dtype=dtype))
    return _figures(trace)


def decode_window(spec: ModelSpec, window: Sequence[int], dtype: torch.dtype) -> Figures:
    """Trace the decoder on one window at once."""
    vae: Any = _ready(spec.networks["vae"], dtype)
    with torch.inference_mode(), Trace() as trace:
        trace.hold(vae)
        vae.decode_stage_2_outputs(_empty(1, spec.latent_channels, *window, dtype=dtype)).float()
    return _figures(trace)


def encode(spec: ModelSpec, size: Size, dtype: torch.dtype, *, device: str, mode: str) -> Figures:
    """Trace the exact encoder for a volume, as it runs on a kind of device."""
    vae = _ready(spec.networks["vae"], dtype)
    planes = slab_planes(spec.networks["vae"], size, itemsize=dtype.itemsize, device=device, mode=mode)
    with torch.inference_mode(), Trace() as trace:
        trace.hold(vae)
        streaming.encoded(vae, _empty(1, 1, *size, dtype=dtype), mode=mode, planes=planes)
    return _figures(trace)


def reference_decode(spec: ModelSpec, window: Sequence[int], splits: int) -> Figures:
    """Trace MONAI's decoder as the reference runs it on one window: float16 autocast, group by group, convolutions in `splits`."""
    described = spec.networks["vae"]
    described = dataclasses.replace(described, arguments={**described.arguments, "num_splits": splits, "save_mem": False})
    vae: Any = _built(described, fast=False).eval()
    for module in vae.modules():
        if hasattr(module, "norm_float16"):
            module.norm_float16 = True
    with torch.inference_mode(), Autocast(), Trace(transformed) as trace:
        vae.decode_stage_2_outputs(_empty(1, spec.latent_channels, *window, dtype=torch.float16))
    return _figures(trace)


def train_step(spec: ModelSpec, kind: str, voxels: Sequence[int], *, fast: bool = True, checkpointing: bool = False) -> Figures:
    """Trace a training step in mixed precision, and add both moments of Adam.

    `voxels` are the latent's of a diffusion model (`dm`) or ControlNet, the patch's of a `vae`. With `fast=False` the modules are
    MONAI's as they come, and convolutions transform their layout, as in the reference; else those of `fast_training`.
    """
    names = {"dm": ["unet"], "controlnet": ["unet", "controlnet"], "vae": ["vae"]}[kind]
    found: dict[str, Any] = {}
    cast = Autocast(torch.bfloat16, interpolates=False) if fast else Autocast()
    for name in names:
        described = spec.networks[name]
        if "use_flash_attention" in described.arguments:
            described = dataclasses.replace(described, arguments={**described.arguments, "use_flash_attention": True})
        found[name] = _built(described, fast=fast)
        if fast:
            trainable(found[name])
        if checkpointing:
            inference.recompute(found[name], lambda: cast)  # going back runs outside of the mode
    if kind == "controlnet":
        found["unet"].requires_grad_(False)
    trained = found["controlnet" if kind == "controlnet" else names[0]]
    with cast, Trace(transformed) as trace:
        trace.hold(*found.values())
        if kind == "vae":
            image = _empty(1, 1, *voxels)
            made, mean, sigma = trained(image)
            loss = (made.float() - image).abs().mean() + (mean.float().square() + sigma.float().square()).sum()
        else:
            loss = _diffusion_loss(spec, found, voxels)
        loss.backward()
    moments = 8 * sum(weights.numel() for weights in trained.parameters())
    return _figures(trace, moments)


def _diffusion_loss(spec: ModelSpec, found: dict[str, Any], latent: Sequence[int]) -> Tensor:
    x = _empty(1, spec.latent_channels, *latent)
    arguments = spec.networks["unet"].arguments
    given: dict[str, Any] = {"x": x, "timesteps": _empty(1)}
    if arguments.get("include_spacing_input"):
        given["spacing_tensor"] = _empty(1, 3)
    for side in ("top", "bottom"):
        if arguments.get(f"include_{side}_region_index_input"):
            given[f"{side}_region_index_tensor"] = _empty(1, 4)
    names = {"class_labels": _empty(1, dtype=torch.long)} if arguments.get("num_class_embeds") else {}
    if "controlnet" in found:
        bits = _empty(1, 8, *(n * spec.latent_factor for n in latent))
        down, middle = found["controlnet"](x=x, timesteps=given["timesteps"], controlnet_cond=bits, **names)
        given |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    out: Tensor = found["unet"](**given, **names)
    return (out.float() - x).square().mean()


def simulated(plan: Plan, spec: ModelSpec, settings: GenerateSettings) -> Plan:
    """Return a plan whose peaks are traced afresh, for its choices, in place of those of the table."""
    assert plan.geometry is not None
    size, chosen = plan.geometry.size, {choice.name: choice.value for stage in plan.stages for choice in stage.choices}
    dtype = networks.DTYPES[str(chosen["dtype"])]
    latent = tuple(n // spec.latent_factor for n in size)
    device, paired = str(chosen["device"]).split(":")[0], settings.mode == "paired"

    def weights(*names: str) -> float:
        return sum(p.numel() * dtype.itemsize for name in names for p in _built(spec.networks[name]).parameters()) / GIB

    def peak(name: str) -> float | None:
        if name == "denoise":
            step = denoise_step(spec, latent, dtype, paired=paired).peak_gib
            return max(step, embedding(spec, size, dtype, device=device).peak_gib if paired else 0.0) + weights("vae")
        if name == "decode" and "splits" in chosen:
            return None
        if name == "decode" and chosen["decoder"] == "exact":
            made = decode(spec, size, dtype, device=device, mode=str(chosen["sweeps"]))
            return made.peak_gib + weights("unet", *(["controlnet"] if paired else []))
        if name == "encode":
            return encode(spec, size, dtype, device=device, mode=str(chosen["sweeps"])).peak_gib
        if name.startswith("train-"):
            kind = name.removeprefix("train-")
            voxels = size if kind == "vae" else latent
            return train_step(spec, kind, voxels, checkpointing=bool(chosen["checkpointing"])).peak_gib + TRAINING_GIB
        return None

    stages = []
    for stage in plan.stages:
        found = peak(stage.name) if stage.peak_gib is not None else None
        stages.append(stage if found is None else dataclasses.replace(stage, peak_gib=round(found, 2)))
    return dataclasses.replace(plan, stages=tuple(stages), warnings=(*plan.warnings, "peaks were traced afresh"))
