"""Helpers for tests of plugins and of `maisi` itself: a model that is built in a second, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = """
schema = "maisi.model/1"
name = "tiny"
summary = "Random weights, for tests"
modality = "ct"
modalities = ["ct"]
modes = ["paired", "image", "mask"]
scale_factor = 1.0

[limits]
multiple = 16
size_min = 16
size_max = 64
spacing_xy_mm = [1.0, 30.0]
spacing_z_mm = [1.0, 30.0]
pads = true

[defaults]
steps = 2

[scheduler]
name = "rflow"

[networks.vae]
kind = "autoencoder_kl_maisi"
spatial_dims = 3
in_channels = 1
out_channels = 1
latent_channels = 4
num_channels = [16, 16, 16]
num_res_blocks = [1, 1, 1]
norm_num_groups = 1
norm_eps = 1e-6
attention_levels = [false, false, false]
with_encoder_nonlocal_attn = false
with_decoder_nonlocal_attn = false
use_checkpointing = false
use_convtranspose = false

[networks.unet]
kind = "unet_maisi"
spatial_dims = 3
in_channels = 4
out_channels = 4
num_channels = [8, 8, 8]
attention_levels = [false, false, false]
num_head_channels = [0, 0, 8]
num_res_blocks = 1
include_spacing_input = true
num_class_embeds = 128
resblock_updown = true
include_fc = true
norm_num_groups = 4

[networks.controlnet]
kind = "controlnet_maisi"
spatial_dims = 3
in_channels = 4
num_channels = [8, 8, 8]
attention_levels = [false, false, false]
num_head_channels = [0, 0, 8]
num_res_blocks = 1
conditioning_embedding_in_channels = 8
conditioning_embedding_num_channels = [8, 8, 8]
num_class_embeds = 128
resblock_updown = true
include_fc = true
norm_num_groups = 4
use_checkpointing = false

[[weights]]
part = "vae"
path = "vae.safetensors"

[[weights]]
part = "unet"
path = "unet.safetensors"

[[weights]]
part = "controlnet"
path = "controlnet.safetensors"
"""


def tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of three very small networks with random weights to `folder`; return its `.toml` file."""
    import torch

    from .catalog import model
    from .networks import build
    from .weights import save_state

    path = folder / "tiny.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(TINY, "utf-8")
    spec = model(str(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in spec.weights:
            save_state(spec.weight_path(weight), build(spec.networks[weight.part]).state_dict(), metadata={}, half=False)
    return path


def filled(network: Any, *, std: float = 0.02) -> Any:
    """Fill the weights of a network that begin at zero, as those of ControlNets do, with noise from torch's own generator."""
    from torch import nn

    for weight in network.parameters():
        if not bool(weight.any()):
            nn.init.normal_(weight, std=std)
    return network
