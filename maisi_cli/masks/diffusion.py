"""Masks from the mask diffusion: bodies of chosen organ sizes, on a cube of 384 mm.

Knows no torch until the first mask is made, so that a dry run can ask what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import devices, planning
from ..anatomy import maisi, regions_of
from ..catalog import ModelSpec
from ..errors import CannotRun, Rejected, UsageError
from ..events import Note, OnEvent, Stage, Step, ignore
from ..geometry import Geometry
from ..lesions import measure
from ..repair import repair
from ..seeds import derive
from ..settings import GenerateSettings
from ..tumors import RELATIVE_MAX
from ..volumes import Mask
from . import sizes as anatomy_sizes
from .fitting import fit
from .sources import MASK_PARTS, SIZES, Made, NoMask, Wanted, data_file, require_parts
from .tumors import Best, aim_of

if TYPE_CHECKING:
    from ..engines.making import Engines
    from ..networks import Loaded, Networks
    from .sizes import Vector

VOXEL_MM = 1.5  # of masks of the released networks
LATENT = 64  # voxels along each side of the latent of the released networks, which makes a cube of 384 mm
TRIES = 4  # masks that are made for one sample before it is given up


class Diffusion:
    """The mask source `diffusion`: bodies of chosen anatomy sizes, with a tumour where one is asked for.

    The networks are loaded when the first mask is made. Masks without what was asked for are made again, a few times.
    """

    honours = frozenset({"anatomy_size", "tumor", "mask_steps"})
    parts = MASK_PARTS

    def __init__(
        self, settings: GenerateSettings, spec: ModelSpec, *, device: str = "cpu", dtype: str = "fp32", loaded: Loaded | None = None
    ) -> None:
        if any(part not in spec.networks for part in MASK_PARTS):
            raise UsageError(f"model {spec.name} has no mask networks", hint="use another --mask-source, or --model rflow-ct")
        self.spec, self.device, self.dtype = spec, device, dtype
        self.compat = settings.compat == "reference"
        self.steps = settings.mask_steps
        self.cuda_graphs, self.engine, self.trt = settings.cuda_graphs, settings.engine, settings.trt
        self.ran: dict[str, Any] = {}
        require_parts(spec, MASK_PARTS)
        self.vectors = anatomy_sizes.read_vectors(_vectors_file(spec))
        self.sizes = anatomy_sizes.parse(settings.anatomy_size)
        for slot, size in self.sizes.items():
            anatomy_sizes.check_known(self.vectors, slot, size)
        self.aim = aim_of(settings, self.sizes)
        if self.aim and maisi().name_of(self.aim.tumor) not in anatomy_sizes.SLOTS:
            raise UsageError(f"the mask networks know no {maisi().name_of(self.aim.tumor)}", hint="use another --mask-source")
        also = anatomy_sizes.required(self.sizes) | ({self.aim.tumor} if self.aim else set())
        self.wanted = Wanted.of(settings, also, any_tumor=self.compat)  # the reference takes over its neighbour's
        self.present = anatomy_sizes.slots_of(self.wanted.organs)
        anatomy_sizes.condition(self.vectors, self._told(None), present=self.present)  # refuses here what no patient has
        self.latent = tuple(int(n) for n in spec.mask_scheduler.get("latent_size", (LATENT,) * 3))
        self.channels = int(spec.networks["mask_unet"].arguments["in_channels"])
        self.voxel_mm = voxel_mm(spec)
        self._loaded = loaded
        self._networks: Networks | None = None
        self._engines: Engines | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each weight file that was loaded."""
        return dict(self._networks.hashes) if self._networks else {}

    def __call__(self, settings: GenerateSettings, geometry: Geometry, seed: int, *, on_event: OnEvent = ignore) -> Made:
        """Make a mask on `geometry` that holds what was asked for; of a tumour of a given size, the best of a few.

        Every try is told a size that the one before suggests. Raises `NoMask` when no mask can be used.
        """
        best, problem, size = Best(aim=self.aim), "", None
        for number in range(TRIES):
            own = derive(seed, number, 0, "mask diffusion")
            sizes = self._told(size)
            vector = anatomy_sizes.condition(self.vectors, sizes, own, present=self.present, compat=self.compat)
            tumor = anatomy_sizes.target_tumor(vector, None if self.compat else sizes) or (self.aim.tumor if self.aim else None)
            mask = fit(self.body(vector, own, tumor=tumor, on_event=on_event), geometry, compat=self.compat)
            found = self.wanted.problem(mask)
            if found is not None:
                problem = found
                on_event(Note(text=f"the mask {problem}: another one is made"))
            elif best.offer(mask, {"anatomy_size": dict(zip(anatomy_sizes.SLOTS, vector, strict=True))}):
                break
            size = self._next_size(mask, sizes)
        if best.mask is None:
            raise NoMask(f"none of {TRIES} masks could be used: the last one {problem}",
                         hint="use a larger --fov, leave something out of --anatomy, or change --anatomy-size")  # fmt: skip
        if shortfall := best.shortfall():
            on_event(Note(text=shortfall, level="warning"))
        if not self.wanted.shows(regions_of(best.mask.ids())):
            on_event(Note(text=f"the mask does not show all of {', '.join(settings.regions)}: where a generated body lies in the volume "
                               "cannot be chosen", level="warning"))  # fmt: skip
        return Made(mask=best.mask, about=best.record())

    def _told(self, size: float | None) -> dict[int, float]:
        """Return the sizes that the networks are told, with that of the tumour in mm or ml: `size`, first a typical one."""
        request = self.aim.request if self.aim else None
        if request is None:
            return dict(self.sizes)
        slot = anatomy_sizes.SLOTS.index(request.name)
        told = request.amount if request.unit == "relative" else size if size is not None else anatomy_sizes.typical(self.vectors, slot)
        return {**self.sizes, slot: told}

    def _next_size(self, mask: Mask, told: Mapping[int, float]) -> float | None:
        """Return the size to try next: as much larger, by volume, as the tumour was too small, at most four times as large."""
        request = self.aim.request if self.aim else None
        if request is None or request.volume_ml is None:
            return None
        slot = anatomy_sizes.SLOTS.index(request.name)
        made = measure(mask, request.tumor).volume_ml
        factor = min(max(request.volume_ml / made, 1 / 4), 4.0) if made else 2.0
        return min(told[slot] * factor, RELATIVE_MAX.get(request.tumor, 1.0))

    def body(self, vector: Vector, seed: int, *, tumor: int | None = None, on_event: OnEvent = ignore) -> Mask:
        """Make one body of these sizes on the cube of the mask networks, mended, with no tumour but `tumor`."""
        import torch

        from .. import sampling
        from . import denoising

        nets = self._load(on_event)
        noise = sampling.initial_noise((1, self.channels, *self.latent), seed)
        generator = torch.Generator().manual_seed(derive(seed, 0, 0, "mask steps"))
        on_event(Stage(name="mask", detail=f"ddpm, {self.steps} steps, {nets.device}, {nets.precision.name}"))

        def on_step(done: int, total: int, _latent: object) -> None:
            on_event(Step(stage="mask", done=done, total=total))

        latent = denoising.sample(nets, vector, noise, steps=self.steps, generator=generator, on_step=on_step, compat=self.compat)
        if not bool(torch.isfinite(latent).all()):
            raise Rejected("the mask diffusion diverged: its latent is not finite", hint="use --dtype fp32, or more --mask-steps")
        sweeps = planning.mask_sweeps(self.spec, self.dtype, devices.device_of(self.device))
        channels = denoising.decode(nets, latent, sweeps=sweeps)
        array = repair(denoising.to_labels(channels), tumor=tumor, compat=self.compat)
        return Mask(array=array, geometry=Geometry(size=array.shape, spacing=(self.voxel_mm,) * 3))  # type: ignore[arg-type]

    def _load(self, on_event: OnEvent) -> Networks:
        from .. import networks, weights

        def load() -> Networks:
            device = networks.device_named(self.device)
            on_event(Stage(name="load", detail=f"mask networks of {self.spec.name} on {device}"))
            precision = networks.Precision.named(self.dtype, device)
            files = weights.locate(self.spec, MASK_PARTS)
            return networks.load(self.spec, MASK_PARTS, device=device, precision=precision, files=files, cuda_graphs=self.cuda_graphs)

        self._loaded = self._loaded or networks.Loaded()
        self._networks = self._loaded.get("mask", (self.spec.path, self.device, self.dtype, self.cuda_graphs), load)
        return self._fitted(self._networks, on_event)

    def _fitted(self, nets: Networks, on_event: OnEvent) -> Networks:
        """Return the networks with an engine in the place of the UNet, where it runs compiled."""
        from .. import weights
        from ..engines import making, wish

        self._engines = self._engines or making.Engines(on_event)
        made = self._engines.fitted(nets, {"mask_unet": self.latent}, weights.locate(self.spec, MASK_PARTS), wish(self.engine, self.trt))
        self.ran = making.recorded(made, ("mask_unet",))
        return made


def voxel_mm(spec: ModelSpec) -> float:
    """Return the spacing of the masks that a model generates: `mask_scheduler.voxel_mm` of its file, or that of the released networks."""
    return float(spec.mask_scheduler.get("voxel_mm", VOXEL_MM))


def _vectors_file(spec: ModelSpec) -> Path:
    path = data_file(spec, SIZES)
    if path is None:
        raise UsageError(
            f"model {spec.name} lists no anatomy sizes", hint=f"add a [[weights]] of part data with {SIZES} in its name to {spec.path}"
        )
    if not path.is_file():
        raise CannotRun(f"the anatomy sizes of {spec.name} are not installed: {path} is missing", hint=f"maisi models pull {spec.name}")
    return path
