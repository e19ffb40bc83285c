"""`train controlnet`: the ControlNet that makes a diffusion model follow a mask; the model stays frozen, or learns along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import maisi
from ..errors import UsageError
from ..networks import binarise, build, fill
from ..repair import without_lesions
from ..tumors import hosts
from ..volumes import Mask, Volume
from ..weights import load_state
from . import contrastive, previews, vocabulary
from .diffusion import DiffusionTask, Encoded, latent_list, load_cases
from .lists import read_list, split
from .losses import distance
from .settings import TrainSettings


class Pair(nn.Module):
    """A ControlNet and the diffusion model that it steers, as one network."""

    def __init__(self, controlnet: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.controlnet, self.unet = controlnet, unet

    def forward(self, x: Tensor, times: Tensor, labels: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the predictions for each of several label maps, one after the other along the batch; without any that of the model alone.

        What the diffusion model makes on its way down depends on no mask: it is computed once.
        """
        if not labels:
            return self.unet(x=x, timesteps=times, **inputs)  # type: ignore[no-any-return]
        count = len(labels)
        classes = {name: repeated(value, count) for name, value in inputs.items() if name == "class_labels"}
        down, middle = self.controlnet(
            x=repeated(x, count), timesteps=repeated(times, count), controlnet_cond=binarise(torch.cat(list(labels))), **classes
        )
        return steered(self.unet, x, times, inputs, down, middle, count)


def repeated(values: Tensor, count: int) -> Tensor:
    """Return a batch `count` times, one after the other."""
    return values.repeat(count, *[1] * (values.ndim - 1)) if count > 1 else values


def steered(
    unet: Any, x: Tensor, times: Tensor, inputs: Mapping[str, Tensor], down: Sequence[Tensor], middle: Tensor, count: int
) -> Tensor:  # fmt: skip
    """Return the predictions of a diffusion model of MONAI's for `count` sets of a ControlNet's residuals, along the batch.

    The same numbers as `count` calls: its way down is run once, its middle and its way up on all sets together. Where the last
    feature of the way down is what the middle reads, the residual is there too, as MONAI's sum in place has it.
    """
    emb = unet._get_time_and_class_embedding(x, times, inputs.get("class_labels"))
    emb = unet._get_input_embeddings(
        emb, inputs.get("top_region_index_tensor"), inputs.get("bottom_region_index_tensor"), inputs.get("spacing_tensor")
    )
    h, features = unet._apply_down_blocks(unet.conv_in(x), emb, None, None)
    summed = [repeated(feature, count) + residual for feature, residual in zip(features, down, strict=True)]
    emb = repeated(emb, count)
    h = unet.middle_block(summed[-1] if features[-1] is h else repeated(h, count), emb, None) + middle
    made: Tensor = unet.out(unet._apply_up_blocks(h, emb, None, summed))
    return made


class ControlNetTask(DiffusionTask):
    """The ControlNet of a diffusion model (Zhang et al. 2023): the labels' bits steer the prediction.

    With `train_unet` the diffusion model learns too and is written beside the ControlNet; a share `label_dropout` of its
    batches comes without labels, so that it keeps making images on its own. `weighted_labels` count `weighted_loss` times.
    With a `contrastive_weight` the same noise is also predicted for the mask without its lesions: where those lie the two
    predictions are to differ, and elsewhere that without them is to be right (MAISI-v2). Cases of the list `replay` are drawn
    with probability `replay_share`, so that what was learned before is not forgotten.
    """

    name = "controlnet"
    labelled = True

    def __init__(self, settings: TrainSettings, data: Path) -> None:
        if not settings.unet:
            raise UsageError("train controlnet needs the diffusion model's weights", hint="add --unet FILE")
        self.weighted = tuple(maisi().id(name) for name in settings.weighted_labels)
        super().__init__(settings, data, network="controlnet")
        path = Path(settings.unet)
        state = load_state(path)
        self.unet: nn.Module = build(self.spec.networks["unet"])
        fill(self.unet, state.tensors, path)
        self.scale = state.scale_factor or self.scale
        if not settings.init:
            copy_matching(self.unet, self.network)
        self.controlnet = self.network
        if settings.train_unet:
            add_residuals_out_of_place(self.unet)
        else:
            self.unet.requires_grad_(False).eval()
            self.generalise = self.dropout = 0.0
        self.network = Pair(self.controlnet, self.unet) if settings.train_unet else self.controlnet
        self.replayed = replayed(settings)
        self.voxels = vocabulary.counted({"training": self.cases, "held out": self.held})
        self.notes += vocabulary.told(self.voxels, maisi(), self.weighted)
        if settings.contrastive_weight and not any(hosts(label) for label in self.voxels["training"]):
            raise UsageError("the region-contrastive loss compares masks with and without lesions, and no training case has one",
                             hint="set train.contrastive_weight to 0")  # fmt: skip

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that are written."""
        return ("controlnet", "unet") if self.settings.train_unet else ("controlnet",)

    def to(self, device: torch.device) -> None:
        """Move the frozen networks; lay the condition's convolutions, of few channels, out as a CPU likes them."""
        super().to(device)
        self.unet.to(device)
        if device.type == "cpu":
            self.controlnet.controlnet_cond_embedding.to(memory_format=torch.channels_last_3d)  # type: ignore[operator, union-attr, call-overload]

    def draw_case(self, rng: np.random.Generator, among: Sequence[Encoded] | None = None) -> Encoded:
        """Draw one training case, or one of those that are replayed."""
        if among is None and self.replayed and rng.random() < self.settings.replay_share:
            return super().draw_case(rng, self.replayed)
        return super().draw_case(rng, among)

    def batch(self, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw a batch; where the diffusion model learns too, some come without labels; with contrast, also without lesions."""
        batch = dict(super().batch(rng))
        if self.settings.train_unet and rng.random() < self.settings.label_dropout:
            del batch["labels"]
        elif self.settings.contrastive_weight:
            labels = batch["labels"].numpy()
            batch["without"] = torch.from_numpy(np.stack([without_lesions(each[0])[None] for each in labels]))
        return batch

    def loss(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the weighted distance to the target, and with contrast the two terms of the region-contrastive loss."""
        latent, times, noise = self.noised(batch)
        target = self.target(latent, noise)
        labels = [batch[name] for name in ("labels", "without") if name in batch]
        made = self._pair(network)(self.at(latent, noise, times), times, labels, self.inputs(batch))
        made, without = made.split(len(latent)) if len(labels) == 2 else (made, None)
        total = self.weighted_distance(made, target, batch.get("labels"))
        figures: dict[str, float | Tensor] = {"distance": total.detach()}
        if without is not None:
            changed, same = contrastive.regions(batch["labels"], batch["without"], latent.shape[2:])
            near = contrastive.foreground(made.float(), without.float(), changed, self.settings.contrastive_delta)
            far = contrastive.background(without.float(), target, same)
            total = total + self.settings.contrastive_weight * (near + far)
            figures |= {"foreground": near.detach(), "background": far.detach()}
        return total, figures

    def weighted_distance(self, made: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean distance, where voxels of `weighted_labels` count `weighted_loss` times; divided by all voxels, as published."""
        if labels is None or not self.weighted or self.settings.weighted_loss <= 1:
            return distance(made, target, self.settings.loss)
        weights = contrastive.weights(labels, self.weighted, self.settings.weighted_loss, made.shape[2:])
        difference = made.float() - target.float()
        return ((difference.abs() if self.settings.loss == "l1" else difference.square()) * weights).mean()

    def _pair(self, network: nn.Module) -> nn.Module:
        return network if self.settings.train_unet else Pair(network, self.unet)

    def predict(self, network: nn.Module, x: Tensor, times: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the prediction of the diffusion model with the ControlNet's residuals."""
        labels = [batch["labels"]] if "labels" in batch else []
        return self._pair(network)(x, times, labels, self.inputs(batch))  # type: ignore[no-any-return]

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Return the loss at fixed times with fixed noise on held-out cases; with `weighted_labels` also that inside of them."""
        found = super().validate(network)
        if self.weighted:
            inside = self._inside(network)
            if inside is not None:
                found["weighted"] = inside
        return found

    def told(self, case: Encoded) -> dict[str, Volume | Mask]:
        """Return the labels that the image is to follow."""
        return {f"{case.id}: labels": previews.mask_of(case.labels, case.spacing_mm)}

    def _inside(self, network: nn.Module) -> float | None:
        device = next(network.parameters()).device
        losses = []
        for index, case in enumerate(self.held):
            batch = self.held_batch(case, device)
            where = contrastive.weights(batch["labels"], self.weighted, 2.0, batch["latent"].shape[2:]) > 1
            if not bool(where.any()):
                continue
            noise = torch.randn(batch["latent"].shape, generator=torch.Generator().manual_seed(index)).to(device)
            at = torch.tensor([350.0], device=device)
            apart = self.predict(network, self.at(batch["latent"], noise, at), at, batch) - self.target(batch["latent"], noise)
            losses.append(float(apart.square().mean(1, keepdim=True)[where].mean()))
        return float(np.mean(losses)) if losses else None

    def exports(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each part by their names in it."""
        if not self.settings.train_unet:
            return {"controlnet": dict(tensors)}
        return {part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
                for part in self.parts}  # fmt: skip

    def metadata(self, part: str) -> dict[str, str]:
        """Name the part; the diffusion model carries its latent scale, the ControlNet the labels that it saw."""
        if part == "unet":
            return {"part": part, "scale_factor": repr(self.scale)}
        return {"part": part, "labels": json.dumps({maisi().name_of(label): label for label in self.voxels["training"] if label})}


def replayed(settings: TrainSettings) -> list[Encoded]:
    """Return the training cases of the list that is replayed."""
    if not settings.replay:
        return []
    return load_cases(split(read_list(latent_list(Path(settings.replay))), settings.fold)[0])


def add_residuals_out_of_place(unet: nn.Module) -> None:
    """Let a diffusion model add a ControlNet's residuals to copies of its features.

    MONAI's adds in place, which fails when the gradient of those features is wanted. The last feature is also what the middle
    block reads, so there too the sum replaces it. Equal numbers.
    """
    original = unet._apply_down_blocks

    def apply_down_blocks(h: Tensor, emb: Tensor, context: Tensor | None, residuals: Any) -> tuple[Tensor, list[Tensor]]:
        h, features = original(h, emb, context, None)  # type: ignore[operator]
        if residuals is None:
            return h, features
        summed = [feature + residual for feature, residual in zip(features, residuals, strict=True)]
        return (summed[-1] if features[-1] is h else h), summed

    unet._apply_down_blocks = apply_down_blocks  # type: ignore[assignment]


def copy_matching(source: nn.Module, target: nn.Module) -> int:
    """Copy every tensor that has the same name and shape in both; return how many there were."""
    wanted = target.state_dict()
    same = {key: value for key, value in source.state_dict().items() if key in wanted and wanted[key].shape == value.shape}
    target.load_state_dict({**wanted, **same})
    return len(same)


def task(settings: TrainSettings, data: Path) -> ControlNetTask:
    """Return the task of `train controlnet`."""
    return ControlNetTask(settings, latent_list(data))
