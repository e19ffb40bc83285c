"""The built-in plugin: everything that comes with `maisi`, registered as a third party would."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from .hookspecs import Register, hookimpl

DATA = Path(str(files("maisi_cli") / "data"))


@hookimpl
def register_models(register: Register) -> None:
    """Register the released models and the bundled one."""
    for path in sorted((DATA / "models").glob("*.toml")):
        register(path.stem, path)


@hookimpl
def register_labels(register: Register) -> None:
    """Register the tables from other vocabularies; the labels themselves are `data/anatomy.toml`."""
    for path in sorted((DATA / "remaps").glob("*.toml")):
        register(path.stem, path)


@hookimpl
def register_modalities(register: Register) -> None:
    """Register the modalities that the released models were trained with."""
    for row in tomllib.loads((DATA / "modalities.toml").read_text("utf-8"))["modality"]:
        register(row["name"], row, summary=row["summary"])


@hookimpl
def register_checks(register: Register) -> None:
    """Register the quality checks."""
    room = "maisi_cli.quality"
    register("hu-median", f"{room}:hu_median", summary="median HU of seven organs against real scans")
    register("organs-present", f"{room}:organs_present", summary="the organs asked for are in the mask")
    register("labels-known", f"{room}:labels_known", summary="every label id is in the vocabulary")
    register("label-type", f"{room}:label_type", summary="labels are stored as whole numbers")
    register("intensity", f"{room}:intensity", summary="values are finite and not all the same")
    register("clipped", f"{room}:clipped", summary="share of the body at the ends of the HU scale")
    register("follows-mask", f"{room}:follows_mask", summary="HU steps across organ borders are as anatomy makes them")
    register("organ-volumes", f"{room}:organ_volumes", summary="volumes of whole organs against those of adults")
    register("components", f"{room}:components", summary="organs that are one piece are in one piece")
    register("laterality", f"{room}:laterality", summary="left and right are where they belong")
    register("organs-expected", f"{room}:organs_expected", summary="no organ is missing where its neighbours are in view")
    register("seam", f"{room}:seam", summary="no plane across which the image steps, as tiles leave it")
    register("mr-background", f"{room}:mr_background", summary="MR: dark corners, nothing negative")
    register("mr-contrast", f"{room}:mr_contrast", summary="MR: contrast in the tissue, no ceiling")


@hookimpl
def register_features(register: Register) -> None:
    """Register the feature extractors of `fid`; their weights are models of the catalogue."""
    room = "maisi_cli.features"
    register("maisi-slices", f"{room}:maisi_slices", summary="comes with maisi; not comparable to published FIDs")
    register("radimagenet-resnet50", f"{room}:radimagenet_resnet50", summary="the 2.5D FID of the MAISI papers")
    register("imagenet-squeezenet1_1", f"{room}:imagenet_squeezenet", summary="the second extractor of the reference")


@hookimpl
def register_samplers(register: Register) -> None:
    """Register the samplers of the released models, and faster ones."""
    room = "maisi_cli.sampling"
    register("rflow", f"{room}:euler", summary="rectified flow, Euler steps (rflow models)")
    register("ab2", f"{room}:adams_bashforth_2", summary="rectified flow, Adams-Bashforth of order 2")
    register("heun", f"{room}:heun", summary="rectified flow, Heun: two evaluations a step")
    register("dpm++", f"{room}:dpm_solver_2m", summary="rectified flow, DPM-Solver++(2M)")
    register("unipc", f"{room}:unipc_2", summary="rectified flow, UniPC of order 2")
    register("ddpm", f"{room}:ddpm", summary="reverse diffusion, 1000 steps (ddpm-ct)")
    register("ddim", f"{room}:ddim", summary="reverse diffusion without noise (ddpm-ct)")


@hookimpl
def register_mask_sources(register: Register) -> None:
    """Register the sources of masks."""
    register("file", "maisi_cli.masks:from_file", summary="a label map of one's own (--mask)")
    register("database", "maisi_cli.masks.database:Database", summary="masks of patients, from a database on disk")
    register("diffusion", "maisi_cli.masks.diffusion:Diffusion", summary="bodies of chosen organ sizes, from the mask networks")
    register("phantom", "maisi_cli.masks:phantom", summary="a procedural body, another one for every seed")


@hookimpl
def register_formats(register: Register) -> None:
    """Register the output formats."""
    register("nifti", "maisi_cli.volumes:save_nifti", summary="{id}_image.nii.gz and {id}_label.nii.gz; labels.json has the names")


@hookimpl
def register_executors(register: Register) -> None:
    """Register the ways to run many samples."""
    register("local", "maisi_cli.synthesis:run_local", summary="one after another in this process")


@hookimpl
def register_trackers(register: Register) -> None:
    """Register the trackers of training; `log.jsonl` is always written."""
    room = "maisi_cli.train.tracking"
    register("csv", f"{room}:CsvTable", summary="log.csv, a row for each figure")
    register("tensorboard", f"{room}:Board", summary="event files of TensorBoard (pip install maisi[tensorboard])")
