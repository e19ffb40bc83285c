"""Reads the golden cases of `shared/golden`, and builds the small networks that they were made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from maisi_cli.catalog import Licence, Limits, ModelSpec, NetworkSpec, WeightFile
from maisi_cli.networks import Networks, Precision, load
from torch import Tensor

Shared = Callable[[str], Path]

CPU = torch.device("cpu")
FP32 = Precision.named("fp32", CPU)

# our name of a part, its key in the reference's configuration
_PARTS = {
    "vae": "autoencoder_def",
    "unet": "diffusion_unet_def",
    "controlnet": "controlnet_def",
    "mask_vae": "mask_generation_autoencoder_def",
    "mask_unet": "mask_generation_diffusion_def",
}
_KINDS = {
    "AutoencoderKlMaisi": "autoencoder_kl_maisi",
    "DiffusionModelUNetMaisi": "unet_maisi",
    "ControlNetMaisi": "controlnet_maisi",
    "DiffusionModelUNet": "unet",
}
_FILES = {
    "vae": ("autoencoder_v1.pt", "state_dict"),
    "unet": ("diff_unet_3d_{family}-ct.pt", "unet"),
    "controlnet": ("controlnet_3d_{family}-ct.pt", "controlnet"),
    "mask_vae": ("mask_generation_autoencoder.pt", "state_dict"),
    "mask_unet": ("mask_generation_diffusion_unet.pt", "mask_unet"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One case: what ran (`meta`), and its arrays and random draws by name."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    draws: list[Tensor]

    def tensor(self, name: str) -> Tensor:
        """Return an array as a tensor."""
        return torch.from_numpy(self.arrays[name])


def case(shared: Shared, name: str) -> Golden:
    """Read the case `name`."""
    folder = shared(f"golden/{name}")
    found: dict[str, dict[str, np.ndarray]] = {"arrays": {}, "rng": {}}
    for kind, arrays in found.items():
        if (folder / f"{kind}.npz").exists():
            with np.load(folder / f"{kind}.npz") as file:
                arrays.update({key: file[key] for key in file.files})
    draws = [torch.from_numpy(found["rng"][key]) for key in sorted(found["rng"])]
    return Golden(meta=json.loads((folder / "case.json").read_text("utf-8")), arrays=found["arrays"], draws=draws)


def spec(shared: Shared, family: str) -> ModelSpec:
    """Return the small model of the goldens as we describe models; `family` is `rflow` or `ddpm`."""
    config = json.loads(shared(f"golden/configs/config_network_{family}.json").read_text("utf-8"))
    folder = shared("golden/checkpoints")
    networks = {}
    for part, key in _PARTS.items():
        arguments = {name: config[value[1:]] if isinstance(value, str) and value.startswith("@") else value
                     for name, value in config[key].items()}  # fmt: skip
        kind = _KINDS[arguments.pop("_target_").rsplit(".", 1)[-1]]
        networks[part] = NetworkSpec(name=part, kind=kind, arguments=arguments)
    weights = tuple(WeightFile(part=part, path=name.format(family=family), layout=layout)
                    for part, (name, layout) in _FILES.items())  # fmt: skip
    return ModelSpec(
        name=f"small-{family}", summary="", modality="ct", modalities=("ct",), modes=("image", "paired"),
        networks=networks, weights=weights, scheduler={"name": family}, mask_scheduler={}, limits=Limits(), defaults={},
        licence=Licence(name="none"), path=folder / "small.toml",
    )  # fmt: skip


def model_file(
    shared: Shared, family: str, folder: Path, *, limits: str = "", latent: tuple[int, int, int] = (16, 16, 16),
    modalities: tuple[str, ...] = ("ct",),
) -> Path:  # fmt: skip
    """Write a model `.toml` of the small networks, with the small mask database, to `folder`; return its path."""
    small = spec(shared, family)
    lines = ['schema = "maisi.model/1"', f'name = "{small.name}"', 'modes = ["paired", "image", "mask"]',
             f"modalities = {json.dumps(modalities)}", "[limits]",
             limits or "multiple = 16\nsize_min = 16\nsize_max = 64", "[scheduler]", f'name = "{family}"',
             "[mask_scheduler]", 'name = "ddpm"', f"latent_size = {list(latent)}"]  # fmt: skip
    for part, network in small.networks.items():
        lines += [f"[networks.{part}]", f'kind = "{network.kind}"']
        lines += [f"{key} = {json.dumps(value)}" for key, value in network.arguments.items()]
    data = [(shared(f"golden/datasets/{name}.json"), "data", "data") for name in ("candidate_masks_small", "all_anatomy_size_conditions")]
    for path, part, layout in [*data, *((small.weight_path(each), each.part, each.layout) for each in small.weights)]:
        lines += ["[[weights]]", f'part = "{part}"', f"path = {json.dumps(str(path))}", f'layout = "{layout}"']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.toml").write_text("\n".join(lines), "utf-8")
    return folder / "small.toml"


def networks(shared: Shared, family: str, *parts: str, precision: Precision = FP32, fast: bool = True) -> Networks:
    """Load parts of the small model from the checkpoints, on the CPU."""
    model = spec(shared, family)
    files = {weight.part: model.weight_path(weight) for weight in model.weights}
    return load(model, parts, device=CPU, precision=precision, files=files, fast=fast)


def worst(made: Tensor, wanted: Tensor) -> float:
    """Return max |made - wanted| in standard deviations of `wanted`."""
    assert made.shape == wanted.shape
    return float((made.double() - wanted.double()).abs().max() / wanted.double().std())


def close(made: Tensor, wanted: Tensor) -> bool:
    """Say whether the float outputs of a single function agree: rtol 1e-4, atol 1e-5 standard deviations of `wanted`."""
    assert made.shape == wanted.shape
    return torch.allclose(made.double(), wanted.double(), rtol=1e-4, atol=1e-5 * float(wanted.double().std()))
