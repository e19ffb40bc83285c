"""The networks: built from their specification, loaded strictly, and turned into plain callables.

The modules are MONAI's (`monai.apps.generation.maisi`, `monai.networks.nets`), with the released weights' names. `fast`
replaces what only costs time (`inference`), and splitting of convolutions into slabs by whole ones; the weights stay the
same, and the numbers to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import inference, streaming
from .catalog import ModelSpec, NetworkSpec
from .devices import default_dtype
from .errors import CannotRun, UsageError
from .graphs import Captured
from .kernels import LAYOUT

if TYPE_CHECKING:
    from .weights import State

Denoise = Callable[[Tensor, Tensor], Tensor]

_CLASSES = {
    "autoencoder_kl_maisi": ("monai.apps.generation.maisi.networks.autoencoderkl_maisi", "AutoencoderKlMaisi"),
    "unet_maisi": ("monai.apps.generation.maisi.networks.diffusion_model_unet_maisi", "DiffusionModelUNetMaisi"),
    "controlnet_maisi": ("monai.apps.generation.maisi.networks.controlnet_maisi", "ControlNetMaisi"),
    "unet": ("monai.networks.nets.diffusion_model_unet", "DiffusionModelUNet"),
    "slice_net": ("maisi_cli.backbones", "SliceNet"),
    "resnet50": ("maisi_cli.backbones", "ResNet50"),
    "squeezenet1_1": ("maisi_cli.backbones", "SqueezeNet"),
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What weights and activations are held in; norms compute in float32 in any of them."""

    name: str
    dtype: torch.dtype

    @classmethod
    def named(cls, name: str, device: torch.device) -> Precision:
        """Return `fp32`, `bf16`, `fp16`, or for `auto` what suits the device.

        That is fp16 on CUDA, bf16 on a CPU with instructions for it (AVX512-BF16 or AMX), fp32 elsewhere.
        """
        if name == "auto":
            name = default_dtype(device.type)
        if name not in DTYPES:
            raise UsageError(f"there is no precision {name!r}", hint="use --dtype auto, fp32, bf16 or fp16")
        return cls(name=name, dtype=DTYPES[name])


def device_named(name: str) -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`. Raises `CannotRun` when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", hint="use --device auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotRun("this machine has no CUDA device that torch can use", hint="use --device cpu, or see  maisi doctor")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CannotRun("this machine has no MPS device", hint="use --device cpu")
    return device


def build(spec: NetworkSpec, *, fast: bool = True) -> nn.Module:
    """Build one network from its specification, in float32 with random weights.

    Flags that a machine without CUDA cannot construct (`use_flash_attention`) or that fail outside float16 autocast
    (`norm_float16`) are dropped: neither touches a weight. With `fast=False` MONAI's modules stay as they come.
    Raises `UsageError` when the arguments do not fit the class.
    """
    from importlib import import_module

    if spec.kind not in _CLASSES:
        raise UsageError(f"there is no network kind {spec.kind!r}", hint=f"use {', '.join(_CLASSES)}")
    module, name = _CLASSES[spec.kind]
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.arguments.items()}
    flash = bool(arguments.get("use_flash_attention", False))
    if "use_flash_attention" in arguments:
        arguments["use_flash_attention"] = False
    if spec.kind == "unet" and "num_channels" in arguments:
        arguments["channels"] = arguments.pop("num_channels")  # MONAI's name for it in this class alone
    if spec.kind == "autoencoder_kl_maisi":
        arguments["norm_float16"] = False
        if fast:
            arguments["num_splits"] = 1
            arguments["save_mem"] = False
    try:
        network: nn.Module = getattr(import_module(module), name)(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"the network {spec.name} cannot be built: {error}", hint="check its arguments in the model file") from error
    inference.native(network, norms=fast, attention=fast or flash)
    return network


def binarise(labels: Tensor, *, dtype: torch.dtype = torch.float32, channels: int = 8) -> Tensor:
    """Return the bits of the labels, least significant first: (B, 1, X, Y, Z) uint8 to (B, channels, X, Y, Z)."""
    if labels.dtype != torch.uint8:
        labels = labels.to(torch.uint8)
    bits = torch.empty((labels.shape[0], channels, *labels.shape[2:]), dtype=dtype, device=labels.device)
    for bit in range(channels):  # channel by channel: no eightfold copy of a wider type
        bits[:, bit] = (labels[:, 0] >> bit) & 1
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a sample is conditioned on.

    `spacing_mm` of the volume; `modality` id (class embedding); `top_region`, `bottom_region` indices for networks that
    take them; `labels` (1, 1, X, Y, Z) uint8 for the ControlNet, `labels_without_tumor` for tumour guidance. A guidance
    scale of 0 skips the unconditional branch. `compat_half_spacing`: the spacing is rounded to float16 before it is scaled,
    and after, as the reference does for masks of the user's and generated ones.
    """

    spacing_mm: tuple[float, float, float]
    modality: int = 1
    top_region: int | None = None
    bottom_region: int | None = None
    labels: Tensor | None = None
    labels_without_tumor: Tensor | None = None
    cfg_modality: float = 0.0
    cfg_tumor: float = 0.0
    cfg_mask: float = 0.0
    compat: bool = False
    compat_half_spacing: bool = False


def _taken_away(condition: Condition) -> tuple[int, Tensor | None]:
    """Return the modality and the labels of the branch that guidance points away from.

    Guidance by modality takes the modality away, by a tumour the tumour (the reference the modality too), by the mask the mask.
    """
    if condition.cfg_tumor and condition.labels_without_tumor is None:
        raise UsageError("cfg_tumor needs the mask without its tumour to compare with", hint="set cfg_tumor to 0")
    labels = condition.labels_without_tumor if condition.cfg_tumor else condition.labels
    if condition.cfg_modality:
        return 0, labels
    if condition.cfg_tumor:
        return 0 if condition.compat else condition.modality, labels
    return condition.modality, None


@dataclass(slots=True, kw_only=True)
class Networks:
    """The loaded networks of a model, by part, on one device and in one precision; `engines` are called in the place of parts."""

    spec: ModelSpec
    parts: dict[str, nn.Module]
    scale_factor: float
    device: torch.device
    precision: Precision
    hashes: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: bool = True
    engines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def denoiser(self, condition: Condition) -> Denoise:
        """Return `denoise(x, t)`: (B, C, x, y, z) latent and scalar time in [0, 1000] to the network's prediction.

        Everything that does not change over the steps is computed here, once; on CUDA a step is captured as a graph. With
        guidance s the prediction is u + s (c - u), as in classifier-free guidance (Ho and Salimans 2022, eq. 6, with s = 1 + w).
        """
        on = []
        for name in ("cfg_modality", "cfg_tumor", "cfg_mask"):
            scale = float(getattr(condition, name))
            if scale < 0:
                raise UsageError(f"{name} is {scale:g}", hint="a guidance scale is 0 (off) or larger")
            on += [name] * bool(scale)
        if len(on) > 1 and not condition.compat:
            raise UsageError(f"{on[0]} and {on[1]} are both on", hint="use one guidance at a time")
        capture = self.capture()
        conditional = capture(self._branch(condition, condition.modality, condition.labels))
        scale = condition.cfg_modality or condition.cfg_tumor or condition.cfg_mask
        if not scale or scale == 1:
            return conditional
        unconditional = capture(self._branch(condition, *_taken_away(condition)))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            with_condition = conditional(x, t)
            without = unconditional(x, t)
            return without + scale * (with_condition - without)

        return guided

    def capture(self) -> Callable[[Denoise], Denoise]:
        """Return what turns steps that never run at the same time into CUDA graphs, where there is CUDA and they are wanted."""
        if self.device.type != "cuda" or not self.cuda_graphs or self.engines:
            return lambda step: step
        pool = torch.cuda.graph_pool_handle()
        return lambda step: Captured(step, pool)

    def _branch(self, condition: Condition, modality: int, labels: Tensor | None) -> Denoise:
        unet, controlnet = self.parts["unet"], self.parts.get("controlnet")
        predict: Callable[..., Any] = self.engines.get("unet", unet)
        control: Any = self.engines.get("controlnet", controlnet)
        device = self.device
        arguments = self.spec.networks["unet"].arguments
        extra: dict[str, Tensor] = {}
        if arguments.get("include_spacing_input"):
            extra["spacing_tensor"] = torch.tensor([condition.spacing_mm], dtype=torch.float32, device=device) * 100
            if condition.compat and labels is None:  # the reference's image-only path rounds it to float16
                exact = torch.tensor([condition.spacing_mm], dtype=torch.float64) * 100
                extra["spacing_tensor"] = exact.to(torch.float16).to(device=device, dtype=torch.float32)
            if condition.compat_half_spacing:
                halved = torch.tensor([condition.spacing_mm], dtype=torch.float32).to(torch.float16) * 100
                extra["spacing_tensor"] = halved.to(device=device, dtype=torch.float32)
        for side in ("top", "bottom"):
            if arguments.get(f"include_{side}_region_index_input"):
                index = condition.top_region if side == "top" else condition.bottom_region
                if index is None:
                    raise UsageError(f"model {self.spec.name} needs a body region", hint="choose a --preset that has one")
                one_hot = torch.zeros(1, 4, device=device)
                one_hot[0, index] = 100
                extra[f"{side}_region_index_tensor"] = one_hot
        if arguments.get("num_class_embeds"):
            extra["class_labels"] = torch.full((1,), modality, dtype=torch.long, device=device)
        of_unet, of_controlnet = embedded(unet, extra), embedded(controlnet, {"class_labels": extra.get("class_labels")})
        if labels is not None:
            if controlnet is None:
                raise UsageError(f"model {self.spec.name} has no ControlNet", hint="use --mode image")
            with torch.inference_mode():
                of_controlnet["controlnet_cond_embedding"] = streaming.embedded(
                    controlnet.controlnet_cond_embedding, labels.to(device), binarise, dtype=self.precision.dtype
                )

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            time = t.to(device=device, dtype=torch.float32).reshape(1).expand(x.shape[0])
            with torch.inference_mode():
                known = {name: value.expand(x.shape[0], *value.shape[1:]) for name, value in extra.items()}
                inputs = {"x": x.to(dtype=self.precision.dtype, memory_format=LAYOUT), "timesteps": time, **known}
                if labels is not None:
                    assert controlnet is not None
                    names = {"class_labels": known["class_labels"]} if "class_labels" in known else {}
                    with known_parts(controlnet, of_controlnet):
                        down, middle = control(
                            x=inputs["x"], timesteps=time, controlnet_cond=of_controlnet["controlnet_cond_embedding"], **names
                        )
                    inputs["down_block_additional_residuals"] = down
                    inputs["mid_block_additional_residual"] = middle
                with known_parts(unet, of_unet):
                    return predict(**inputs).float()

        return denoise

    def encode(self, image: Tensor) -> Tensor:
        """Encode (1, 1, X, Y, Z) intensities in [0, 1] to the mean latent, times the scale factor, slab by slab and exactly."""
        with torch.inference_mode():
            mean = streaming.encoded(self.parts["vae"], image.to(device=self.device, dtype=self.precision.dtype))
        return mean.float() * self.scale_factor

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latent of `encode`, both times the scale factor."""
        with torch.inference_mode():
            mean, deviation = streaming.posterior(self.parts["vae"], image.to(device=self.device, dtype=self.precision.dtype))
        return mean.float() * self.scale_factor, deviation * self.scale_factor


EMBEDDERS = {"spacing_tensor": "spacing_layer", "top_region_index_tensor": "top_region_index_layer",
              "bottom_region_index_tensor": "bottom_region_index_layer", "class_labels": "class_embedding"}  # fmt: skip


def embedded(network: Any, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return, by the name of the part that makes it, the embedding of each input that stays the same over the steps."""
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, value in inputs.items():
            layer = getattr(network, EMBEDDERS[name], None)
            if layer is not None and value is not None:
                found[EMBEDDERS[name]] = layer(value).to(network.time_embed[0].weight.dtype)
    return found


class _Known(nn.Module):
    """Stands for a part of a network whose result is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, given: Tensor) -> Tensor:
        """Return what is known, for each member of the batch of what is given."""
        return self.value.expand(len(given), *self.value.shape[1:])


@contextlib.contextmanager
def known_parts(network: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parts of a network return what they are known to make, inside the block."""
    original = {name: network._modules[name] for name in outputs}
    network._modules.update({name: _Known(value) for name, value in outputs.items()})
    try:
        yield
    finally:
        network._modules.update(original)


class Loaded:
    """The networks that were loaded last for each role (image, mask), kept for all samples that need the same ones."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Networks]] = {}

    def get(self, role: str, key: Any, load: Callable[[], Networks]) -> Networks:
        """Return the networks of a role; those of another `key` are let go before `load` is called."""
        if role not in self._held or self._held[role][0] != key:
            self._held.pop(role, None)
            self._held[role] = (key, load())
        return self._held[role][1]


def load(
    model: ModelSpec, parts: Collection[str], *, device: torch.device, precision: Precision,
    files: Mapping[str, Path], fast: bool = True, cuda_graphs: bool = True,
) -> Networks:  # fmt: skip
    """Build and strictly load the named parts (`vae`, `unet`, `controlnet`, ...) from `files`, ready for inference.

    With `fast=False` they are MONAI's as they come, in float32 whatever the precision.

    Raises `UsageError` naming keys that are missing, not expected, or of another shape.
    """
    if device.type == "cpu":
        inference.free_at_once()
    modules: dict[str, nn.Module] = {}
    hashes: dict[str, str] = {}
    scale = None if "mask_unet" in parts else model.scale_factor  # the mask's latent has a scale of its own
    layouts = {weight.part: weight.layout for weight in model.weights}
    for part in parts:
        if part not in model.networks:
            raise UsageError(f"model {model.name} has no {part}", hint=f"see  maisi models show {model.name}")
        network, state = frozen(model.networks[part], files[part], layouts.get(part, "safetensors"), fast=fast)
        hashes[part] = state.sha256
        if part in ("unet", "mask_unet") and state.scale_factor is not None:
            scale = state.scale_factor
        modules[part] = inference.laid_out(network, precision.dtype, device) if fast else network.to(device)
    if scale is None:
        raise UsageError(f"model {model.name} has no scale factor", hint="add scale_factor to its file or to the unet weights")
    return Networks(spec=model, parts=modules, scale_factor=float(scale), device=device, precision=precision, hashes=hashes,
                    cuda_graphs=cuda_graphs)  # fmt: skip


def frozen(spec: NetworkSpec, path: Path, layout: str = "safetensors", *, fast: bool = True) -> tuple[nn.Module, State]:
    """Build a network in float32 with the weights of a file, that does not learn; return it and what the file holds.

    Raises `UsageError` naming keys that do not fit.
    """
    from .weights import load_state

    network, state = build(spec, fast=fast), load_state(path, layout)
    fill(network, state.tensors, path)
    return network.requires_grad_(False).eval(), state


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights of a file. Raises `UsageError` naming keys that do not fit."""
    network.load_state_dict({key: value.float() for key, value in fitting(network, tensors, path).items()})


def fitting(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a network, which may be on the device `meta`, from those of a file.

    The only keys left over may be those that the ddpm-ct files hold in excess. Raises `UsageError` naming keys that are
    missing, not expected, or of another shape.
    """
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted and not _never_applied(network, key)]
    reshaped = [key for key in wanted if key in tensors and wanted[key].shape != tensors[key].shape]
    if missing or unexpected or reshaped:
        first = [*(f"missing {key}" for key in missing[:2]), *(f"unexpected {key}" for key in unexpected[:2]),
                 *(f"{key} is {_shape(tensors[key])}, not {_shape(wanted[key])}" for key in reshaped[:2])]  # fmt: skip
        raise UsageError(
            f"{path} does not fit its network: {len(missing)} keys missing, {len(unexpected)} unexpected, "
            f"{len(reshaped)} of another shape ({', '.join(first)})",
            hint="check that file and model belong together",
        )
    return {key: tensors[key] for key in wanted}


def _never_applied(network: nn.Module, key: str) -> bool:
    """Say whether a key is an attention's output projection that older code stored and never used (MONAI issue 7991)."""
    if not key.endswith((".attn.out_proj.weight", ".attn.out_proj.bias")):
        return False
    found: Any = network
    for name in key.split(".")[:-2]:
        found = getattr(found, name, None)
    return getattr(found, "include_fc", True) is False


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
