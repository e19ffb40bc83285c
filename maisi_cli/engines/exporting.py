"""A part of a model as one function of tensors, ready to be compiled ahead of time: plain modules, examples, `torch.export`.

Compiled networks start from MONAI's modules with torch's own norms and attention, not from those that `inference` lays out:
a compiler fuses what stands in the graph by itself. What is nested in a call (the residuals of a ControlNet) is flat here.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import inference, networks
from ..catalog import ModelSpec
from . import network_of

DOWN, MIDDLE, CONDITION = "down_block_additional_residuals", "mid_block_additional_residual", "controlnet_cond"
EMBEDDERS = {"timesteps": "time_embed", **networks.EMBEDDERS}
"""The layer that embeds an input, by the input's name."""


class Flat(nn.Module):
    """A network that was split from its head, as a function of tensors in the order of `names`; it returns a tuple of tensors."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the network returns, flat."""
        given = dict(zip(self.names, tensors, strict=True))
        unused = {}
        for name, layer in EMBEDDERS.items():
            if layer in given:
                self.network._modules[layer].value = given.pop(layer)  # type: ignore[union-attr]
                unused[name] = torch.zeros(1, dtype=torch.long if name == "class_labels" else torch.float32)
        return tuple(outputs(self.network(**nested(given), **unused)))


class Given(nn.Module):
    """Stands for a layer of the head: its result is an input of what is compiled."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """Return a copy of what was given: the network adds to it in place."""
        return self.value.clone()


class Head:
    """The small layers that embed times, spacings, regions and classes: they stay in PyTorch, in float32.

    Compiled in bf16, the sine of a time in [0, 1000] has nothing left of its phase: OpenVINO's embedding of the time 967 is off
    by a third.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.layers: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            layer, _, key = name.partition(".")
            self.layers.setdefault(layer, {})[key] = value.to(device=device, dtype=torch.float32)

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the inputs of a call with those that are embedded in the place of those that they come from."""
        made: dict[str, Tensor] = {}
        for name, value in inputs.items():
            layer = self.layers.get(EMBEDDERS.get(name, ""))
            if layer is None:
                made[name] = value
                continue
            made[EMBEDDERS[name]] = self._embedded(name, layer, value).to(dtype)
        return made

    def _embedded(self, name: str, layer: Mapping[str, Tensor], value: Tensor) -> Tensor:
        if name == "class_labels":
            return functional.embedding(value, layer["weight"])
        value = value.float()
        if name == "timesteps":
            from monai.networks.nets.diffusion_model_unet import get_timestep_embedding

            value = get_timestep_embedding(value, layer["0.weight"].shape[1])
        hidden = functional.silu(functional.linear(value, layer["0.weight"], layer["0.bias"]))
        return functional.linear(hidden, layer["2.weight"], layer["2.bias"])


def split(network: nn.Module) -> dict[str, Tensor]:
    """Take the head off a network, in place, and return its weights."""
    found: dict[str, Tensor] = {}
    for layer in EMBEDDERS.values():
        part = network._modules.get(layer)
        if part is not None:
            found.update({f"{layer}.{key}": value for key, value in part.state_dict().items()})
            network._modules[layer] = Given()
    return found


class Decoder(nn.Module):
    """The decoder of an autoencoder on a whole latent at once, with the convolution in front of it."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.post_quant_conv, autoencoder.decoder

    def forward(self, z: Tensor) -> Tensor:
        """Return (B, C, 4x, 4y, 4z) from a latent (B, C', x, y, z)."""
        made: Tensor = self.decoder(self.post_quant_conv(z))
        return made


class InFloat32(nn.Module):
    """A part that computes in float32 within a network of another dtype."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.dtype = part, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the part's result in the dtype of the network."""
        made: Tensor = self.part(x.float())
        return made.to(self.dtype)


def flat(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a call without nesting: the third of several residuals `r` is `r.2`."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif value is not None:
            found.update({f"{name}.{k}": each for k, each in enumerate(value)})
    return found


def nested(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what `flat` was given."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        word, dot, _ = name.partition(".")
        if dot:
            found.setdefault(word, []).append(value)
        else:
            found[name] = value
    return found


def outputs(made: Any) -> list[Tensor]:
    """Return the tensors of a network's result, flat: a ControlNet's residuals, then the one of its middle."""
    if isinstance(made, Tensor):
        return [made]
    return [each for part in made for each in outputs(part)]


# --- the parts ------------------------------------------------------------------------------


def plain(spec: ModelSpec, part: str, path: Path) -> tuple[nn.Module, str]:
    """Build a part in float32 with the weights of `path`; return it and the sha256 of the file.

    A ControlNet takes its condition embedded: that is computed once for a sample, in PyTorch.
    """
    name = network_of(part)
    layout = next((weight.layout for weight in spec.weights if weight.part == name), "safetensors")
    network, state = networks.frozen(spec.networks[name], path, layout)
    return bare(network, part), state.sha256


def bare(network: nn.Module, part: str) -> nn.Module:
    """Return what of a network is compiled for a part, ready for inference."""
    if part == "decoder":
        network = Decoder(network)
    elif part == "controlnet":
        network.controlnet_cond_embedding = nn.Identity()
    return network.requires_grad_(False).eval()


def in_dtype(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Turn a network without its head to one that computes in `dtype`, in place: norms stay in float32."""
    if dtype == torch.float32:
        return network.to(device)
    norms = (nn.GroupNorm, nn.LayerNorm)
    for parent in list(network.modules()):
        if getattr(parent, "attention_dtype", None) is not None:
            parent.attention_dtype = None  # type: ignore[assignment]  # fused attention adds up in float32 by itself
        for name, child in list(parent.named_children()):
            if isinstance(child, norms):
                setattr(parent, name, InFloat32(child, dtype))
            elif isinstance(child, nn.AvgPool3d) and device.type == "cpu":
                setattr(parent, name, inference.HalfMean())
    exact = {id(each) for module in network.modules() if isinstance(module, InFloat32) for each in module.part.parameters()}
    for parameter in network.parameters():
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(dtype)
    return network.to(device)


# --- examples -------------------------------------------------------------------------------


def shapes(spec: ModelSpec, part: str, size: Sequence[int], *, residuals: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input of a part for a latent of `size`, by flat name.

    `residuals`: a UNet that is told what its ControlNet says.
    """
    of = spec.networks[network_of(part)].arguments

    def grid(channels: Any, scale: int = 1) -> tuple[int, ...]:
        return (1, int(channels), *(int(n) // scale for n in size))

    if part == "decoder":
        return {"z": grid(of["latent_channels"])}
    found: dict[str, tuple[int, ...]] = {"x": grid(of["in_channels"]), "timesteps": (1,)}
    if part == "controlnet":
        found[CONDITION] = grid(of["num_channels"][0])
    if part == "mask_unet":
        found["context"] = (1, 1, int(of["cross_attention_dim"]))
    if of.get("num_class_embeds"):
        found["class_labels"] = (1,)
    if of.get("include_spacing_input"):
        found["spacing_tensor"] = (1, 3)
    for side in ("top", "bottom"):
        if of.get(f"include_{side}_region_index_input"):
            found[f"{side}_region_index_tensor"] = (1, 4)
    if residuals:
        down = residual_shapes(of)
        found |= {f"{DOWN}.{k}": grid(channels, scale) for k, (channels, scale) in enumerate(down)}
        found[MIDDLE] = grid(*down[-1])
    return found


def examples(
    spec: ModelSpec, part: str, size: Sequence[int], *, residuals: bool = False, dtype: torch.dtype = torch.float32,
    device: torch.device | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Return inputs of a part for a latent of `size`: what it is exported for, and checked with.

    Latents are noise, residuals a tenth of that; the time is late in [0, 1000], where an embedding is easily lost; spacings are
    1.5 mm.
    """
    rng = torch.Generator().manual_seed(seed)
    small = {"timesteps": torch.tensor([967.3]), "class_labels": torch.tensor([1]), "spacing_tensor": torch.full((1, 3), 150.0)}
    for side in ("top", "bottom"):
        small[f"{side}_region_index_tensor"] = torch.tensor([[0.0, 100.0, 0.0, 0.0]])
    found = {}
    for name, shape in shapes(spec, part, size, residuals=residuals).items():
        if name in small:
            found[name] = small[name]
        else:
            scale = 0.1 if name.startswith((DOWN, MIDDLE)) else 1.0
            found[name] = (torch.randn(shape, generator=rng) * scale).to(dtype)
    return _on(found, device)


def _on(tensors: dict[str, Tensor], device: torch.device | None) -> dict[str, Tensor]:
    return tensors if device is None else {name: value.to(device) for name, value in tensors.items()}


def residual_shapes(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (channels, downsampling) of each residual that a UNet takes on its way down, in order."""
    channels = [int(n) for n in arguments["num_channels"]]
    blocks = arguments["num_res_blocks"]
    counts = [int(blocks)] * len(channels) if isinstance(blocks, int) else [int(n) for n in blocks]
    found = [(channels[0], 1)]
    for level, (width, count) in enumerate(zip(channels, counts, strict=True)):
        found += [(width, 2**level)] * count
        if level + 1 < len(channels):
            found.append((width, 2 ** (level + 1)))
    return found


# --- exported -------------------------------------------------------------------------------


def exported(network: nn.Module, inputs: Mapping[str, Tensor], *, dynamic: Mapping[str, Mapping[int, Any]] | None = None) -> Any:
    """Return the `ExportedProgram` of a network without its head, for inputs like these; static but for the axes in `dynamic`."""
    function = Flat(network, list(inputs))
    shapes = None if dynamic is None else (tuple(dict(dynamic.get(name, {})) or None for name in inputs),)
    with torch.no_grad(), quiet():
        program = torch.export.export(function, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
    _prune(program.graph_module)
    return program


def _prune(module: Any) -> None:
    """Remove the embeddings of what stands in for those that are given: nothing but assertions looks at them."""
    for node in [each for each in module.graph.nodes if each.target is torch.ops.aten._assert_tensor_metadata.default]:
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def operators(program: Any) -> dict[str, int]:
    """Return the operators of an exported program, decomposed to the core of ATen, and how often each stands there."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the notes of converters on their own affairs from the user, inside the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
