"""The models: their networks, files and limits against the released ones, and what a model file of one's own must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from maisi_cli import catalog, plugins
from maisi_cli.catalog import ModelSpec, modalities, modality, model, models, read_model
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry, parse_mm
from maisi_cli.hookspecs import hookimpl

usual = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CT = "nvidia/NV-Generate-CT"
RELEASED = ("rflow-ct", "ddpm-ct", "rflow-mr", "rflow-mr-brain")
RFLOW = ("rflow-ct", "rflow-mr", "rflow-mr-brain")

# file -> repository, sha256 or git sha1 as published (None: not known)
PINS = {
    "models/autoencoder_v1.pt": (CT, "1f8a7a056d0ebc00486edc43c26768bf1c12eaa6df9dd172e34598003be95eb3"),
    "models/autoencoder_v2.pt": ("nvidia/NV-Generate-MR", "b5ed556dc64872cae11ebe67cc33e84fbd05ebdf7e35e40c74d956404e7c1ef0"),
    "models/mask_generation_autoencoder.pt": (CT, "539175f6ede3cb1e6f01bfd6347cd446d601cf4a508fc632a1e36362b1428a5d"),
    "models/mask_generation_diffusion_unet.pt": (CT, "b7d668b1356e9b94b8269decadf8f8116dc4ee2d365580d05349b4ddf6739155"),
    "models/diff_unet_3d_rflow-ct.pt": (CT, "cfc1ec59782f5ac7c0d22dd501654732109a971b93cbaa6607c4106a7f29066f"),
    "models/controlnet_3d_rflow-ct.pt": (CT, "2f16d7a6b4d6a22d5ba9278e59fd51f9a17a45244f0f256946c34a762cc12914"),
    "models/diff_unet_3d_rflow-mr.pt": ("nvidia/NV-Generate-MR", "cbf3ee62ec807ebd63e53fe3cd6fcf8ac9249b427dbeee9e4d205e2931e8ca03"),
    "models/diff_unet_3d_ddpm-ct.pt": (CT, None),
    "models/controlnet_3d_ddpm-ct.pt": (CT, None),
    "models/diff_unet_3d_rflow-mr-brain_v1.pt": ("nvidia/NV-Generate-MR-Brain", None),
    "datasets/all_masks_flexible_size_and_spacing_4000.zip": (CT, "ce59e0e7e232c13bfc53c403df0ad22afc711d8e0601750b0a4a8e4d0f648ace"),
    "datasets/candidate_masks_flexible_size_and_spacing_4000.json": (CT, "4f3f1b59aac041c962b202bcf3d2e4b5729a1a66"),
    "datasets/candidate_masks_flexible_size_and_spacing_3000.json": (CT, None),
    "datasets/all_anatomy_size_conditions.json": (CT, "7147004d5b45e9a580c303fb18cbb22a9656c668"),
}
REVISIONS = {
    CT: "48a68e95c77a095870e3374f5b2cca1dd211f317",
    "nvidia/NV-Generate-MR-Brain": "ef9759bf221265b2704569cdeeac20bbf03b62ee",
    "nvidia/NV-Generate-MR": None,
}
MASK_FILES = ["models/mask_generation_autoencoder.pt", "models/mask_generation_diffusion_unet.pt"]
DATA = ["datasets/all_anatomy_size_conditions.json", "datasets/all_masks_flexible_size_and_spacing_4000.zip"]
FILES = {
    "rflow-ct": ["models/autoencoder_v1.pt", "models/diff_unet_3d_rflow-ct.pt", "models/controlnet_3d_rflow-ct.pt", *MASK_FILES, *DATA,
                 "datasets/candidate_masks_flexible_size_and_spacing_4000.json"],
    "ddpm-ct": ["models/autoencoder_v1.pt", "models/diff_unet_3d_ddpm-ct.pt", "models/controlnet_3d_ddpm-ct.pt", *MASK_FILES, *DATA,
                "datasets/candidate_masks_flexible_size_and_spacing_3000.json"],
    "rflow-mr": ["models/autoencoder_v2.pt", "models/diff_unet_3d_rflow-mr.pt"],
    "rflow-mr-brain": ["models/autoencoder_v1.pt", "models/diff_unet_3d_rflow-mr-brain_v1.pt"],
}  # fmt: skip

VAE = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": [64, 128, 256],
    "num_res_blocks": [2, 2, 2], "norm_num_groups": 32, "norm_eps": 1e-6, "attention_levels": [False] * 3,
    "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False, "use_checkpointing": False, "use_convtranspose": False,
    "norm_float16": True, "dim_split": 1,
}  # fmt: skip
TRUNK = {
    "spatial_dims": 3, "in_channels": 4, "num_channels": [64, 128, 256, 512], "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32], "num_res_blocks": 2, "use_flash_attention": True,
}  # fmt: skip
CONDITION = {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [8, 32, 64]}
RFLOW_ONLY = {"num_class_embeds": 128, "resblock_updown": True, "include_fc": True}
DDPM_ONLY = {"resblock_updown": False, "include_fc": False}
REGIONS = ("include_top_region_index_input", "include_bottom_region_index_input")
MASK_VAE = {
    **VAE, "in_channels": 8, "out_channels": 125, "num_channels": [32, 64, 128], "num_res_blocks": [1, 2, 2], "use_checkpointing": True,
    "use_convtranspose": True, "use_flash_attention": False, "num_splits": 8,
}  # fmt: skip
MASK_UNET = {**TRUNK, "out_channels": 4, "with_conditioning": True, "upcast_attention": True, "cross_attention_dim": 10}
DDPM_SCHEDULER = {
    "name": "ddpm", "num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "schedule": "scaled_linear_beta",
    "clip_sample": False,
}  # fmt: skip
RFLOW_SCHEDULER = {"name": "rflow", "num_train_timesteps": 1000, "base_voxels": 32**3}

MINIMAL = """schema = "maisi.model/1"
[networks.vae]
kind = "autoencoder_kl_maisi"
[networks.unet]
kind = "unet_maisi"
"""


def released_ct_takes(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> bool:
    """The reference's check_input_ct."""
    return (
        size[0] == size[1]
        and size[0] in (256, 384, 512)
        and size[2] in (128, 256, 384, 512, 640, 768)
        and spacing[0] == spacing[1]
        and 0.5 <= spacing[0] <= 3.0
        and 0.5 <= spacing[2] <= 5.0
        and size[0] * spacing[0] >= 256
    )


def released_mr_takes(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> bool:
    """The reference's check_input_mr."""
    plane = size[2] == 128 and size[0] == size[1] and size[0] in (128, 256, 384, 512)
    deep = size in ((128, 256, 256), (256, 128, 256), (256, 256, 256))
    return (plane or deep) and all(0.4 <= mm <= 5.0 for mm in spacing)


def accepts(spec: ModelSpec, size: tuple[int, int, int], spacing: tuple[float, float, float], **how: Any) -> bool:
    try:
        spec.check(Geometry(size=size, spacing=spacing), modality=spec.modality, mode="image", **how)
    except UsageError:
        return False
    return True


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs a plugin with these modalities and models, and forget them afterwards."""
    caches = (catalog.modalities, catalog.models)

    def install(*, modalities: dict[str, Any] | None = None, models: dict[str, Any] | None = None) -> None:
        class Acme:
            @hookimpl
            def register_modalities(self, register: Any) -> None:
                for name, target in (modalities or {}).items():
                    register(name, target, summary="of a test")

            @hookimpl
            def register_models(self, register: Any) -> None:
                for name, target in (models or {}).items():
                    register(name, target)

        loaded = plugins.load("", extra={"acme": Acme()})
        monkeypatch.setattr(plugins, "plugins", lambda: loaded)
        for cached in caches:
            cached.cache_clear()

    yield install
    for cached in caches:
        cached.cache_clear()


# --- the released models ----------------------------------------------------------------


def test_the_released_models_and_the_bundled_one_are_there():
    assert {spec.name for spec in models()} >= {*RELEASED, "nano-ct"}
    assert [spec.name for spec in models() if spec.bundled] == ["nano-ct"]


@pytest.mark.parametrize("name", RELEASED)
def test_networks_have_the_arguments_of_the_released_configurations(name):
    networks = model(name).networks
    ddpm = name == "ddpm-ct"
    own = DDPM_ONLY if ddpm else RFLOW_ONLY
    assert networks["vae"].arguments == {**VAE, "num_splits": 8 if ddpm else 4}
    assert networks["unet"].arguments == {
        **TRUNK, **own, "out_channels": 4, "include_spacing_input": True, **dict.fromkeys(REGIONS, ddpm),
    }  # fmt: skip
    assert model(name).body_region_inputs is ddpm
    kinds = {part: network.kind for part, network in networks.items()}
    if name.endswith("-ct"):
        assert networks["controlnet"].arguments == {**TRUNK, **own, **CONDITION}
        assert networks["mask_vae"].arguments == MASK_VAE
        assert networks["mask_unet"].arguments == MASK_UNET
        assert kinds == {"vae": "autoencoder_kl_maisi", "unet": "unet_maisi", "controlnet": "controlnet_maisi",
                         "mask_vae": "autoencoder_kl_maisi", "mask_unet": "unet"}  # fmt: skip
    else:
        assert kinds == {"vae": "autoencoder_kl_maisi", "unet": "unet_maisi",
                         **({"controlnet": "controlnet_maisi"} if name == "rflow-mr" else {})}  # fmt: skip
        if name == "rflow-mr":  # described in the reference's configuration, never released
            assert networks["controlnet"].arguments == {**TRUNK, **own, **CONDITION}
            assert not any(weight.part == "controlnet" for weight in model(name).weights)


@pytest.mark.parametrize("name", RELEASED)
def test_schedulers_defaults_and_scale_factors_are_the_released_ones(name):
    spec = model(name)
    assert spec.scheduler == (DDPM_SCHEDULER if name == "ddpm-ct" else RFLOW_SCHEDULER)
    assert spec.mask_scheduler == (DDPM_SCHEDULER if name.endswith("-ct") else {})
    steps = 1000 if name == "ddpm-ct" else 30
    guidance = {"rflow-mr": 15.0, "rflow-mr-brain": 2.0}.get(name, 0.0)
    assert (spec.defaults["steps"], spec.defaults["cfg_modality"]) == (steps, guidance)
    assert spec.defaults.get("mask_steps") == (1000 if name.endswith("-ct") else None)
    scales = {"rflow-ct": 1.0311251878738403, "rflow-mr": 0.96240234375, "rflow-mr-brain": 0.9696779847145081}
    assert spec.scale_factor == scales.get(name)
    assert (spec.latent_factor, spec.latent_channels) == (4, 4)


@pytest.mark.parametrize("name", RELEASED)
def test_files_are_the_released_ones_with_their_published_hashes(name):
    spec = model(name)
    assert sorted(weight.path for weight in spec.weights) == sorted(FILES[name])
    for weight in spec.weights:
        repo, digest = PINS[weight.path]
        assert (weight.repo, weight.revision) == (repo, REVISIONS[repo])
        assert (weight.sha256 or weight.git_sha1) == digest
        assert weight.sha256 is None or len(weight.sha256) == 64
        assert weight.git_sha1 is None or len(weight.git_sha1) == 40
        assert weight.path.startswith("datasets/" if weight.part == "data" else "models/")
    parts = [weight.part for weight in spec.weights if weight.part != "data"]
    unreleased = {"controlnet"} if name == "rflow-mr" else set()  # it can be trained
    assert sorted(parts) == sorted(set(spec.networks) - unreleased)


def test_weight_files_are_about_as_large_as_published():
    mib = {weight.path: weight.mib for spec in models() for weight in spec.weights}
    gb = {"models/diff_unet_3d_rflow-ct.pt": 2.15, "models/diff_unet_3d_rflow-mr.pt": 2.15, "models/controlnet_3d_rflow-ct.pt": 0.288,
          "models/controlnet_3d_ddpm-ct.pt": 0.275, "models/mask_generation_diffusion_unet.pt": 0.789, "models/autoencoder_v1.pt": 0.084,
          "models/mask_generation_autoencoder.pt": 0.021, "models/diff_unet_3d_ddpm-ct.pt": 0.686,
          "datasets/all_masks_flexible_size_and_spacing_4000.zip": 11.6}  # fmt: skip
    for path, size in gb.items():
        assert mib[path] * 2**20 == pytest.approx(size * 1e9, rel=0.03), path


@pytest.mark.parametrize(
    ("name", "licence", "commercial", "modes", "known", "volume"),
    [
        ("rflow-ct", "NVIDIA Open Model", True, ("paired", "image", "mask"), {1}, "512x512x768"),
        ("ddpm-ct", "NVIDIA Open Model", True, ("paired", "image", "mask"), {1}, "512x512x768"),
        ("rflow-mr", "NVIDIA Non-Commercial", False, ("image",), {9, 10, 11}, "512x512x128"),
        ("rflow-mr-brain", "NVIDIA Open Model", True, ("image",), {8, 9, 10, 11, 16, 20, 29, 30, 31, 32, 33}, "512x512x256"),
    ],
)
def test_licence_modes_and_modalities_are_the_documented_ones(name, licence, commercial, modes, known, volume):
    spec = model(name)
    assert spec.licence.name.startswith(licence)
    assert spec.licence.commercial is commercial
    assert spec.modes == modes
    assert {modality(each).id for each in spec.modalities} == known
    assert spec.max_volume == volume
    assert spec.valid_size(tuple(map(int, volume.split("x"))))  # type: ignore[arg-type]


SIDES = (64, 128, 256, 320, 384, 512, 640, 768)
EDGES = (0.39, 0.4, 0.49, 0.5, 0.51, 1.0, 2.99, 3.0, 3.01, 4.99, 5.0, 5.01)


@pytest.mark.parametrize("name", ["rflow-ct", "ddpm-ct"])
def test_ct_takes_what_the_reference_takes(name):
    spec = model(name)
    for size in product(SIDES, repeat=3):
        assert spec.valid_size(size) is released_ct_takes(size, (1.0, 1.0, 1.0)), size
    for x, z in product(EDGES, repeat=2):  # 512 voxels and the head: only the rules of the reference are left
        assert accepts(spec, (512, 512, 128), (x, x, z), head=True) is released_ct_takes((512, 512, 128), (x, x, z)), (x, z)
    for side, x in product((256, 384, 512), (0.5, 0.66, 0.67, 0.99, 1.0)):
        assert accepts(spec, (side, side, 128), (x, x, 1.0), head=True) is released_ct_takes((side, side, 128), (x, x, 1.0)), (side, x)
    assert not accepts(spec, (512, 512, 128), (1.0, 1.01, 1.0), head=True)


@pytest.mark.parametrize("name", ["rflow-mr", "rflow-mr-brain"])
def test_mr_takes_what_the_reference_takes(name):
    spec = model(name)
    for size in product(SIDES, repeat=3):
        advertised = name == "rflow-mr-brain" and size == (512, 512, 256)
        assert spec.valid_size(size) is (released_mr_takes(size, (1.0, 1.0, 1.0)) or advertised), size
    for x, z in product(EDGES, repeat=2):
        assert accepts(spec, (128, 128, 128), (x, 1.0, z)) is released_mr_takes((128, 128, 128), (x, 1.0, z)), (x, z)
        assert accepts(spec, (128, 128, 128), (1.0, x, z)) is released_mr_takes((128, 128, 128), (1.0, x, z)), (x, z)


# --- limits --------------------------------------------------------------------------------

NAMES = st.sampled_from([*RELEASED, "nano-ct"])
GRIDS = st.builds(
    lambda size, spacing: Geometry(size=size, spacing=spacing),
    st.tuples(*[st.integers(1, 900)] * 3),
    st.tuples(*[st.integers(30, 900).map(lambda n: n / 100)] * 3),
)


@usual
@given(NAMES, GRIDS)
def test_the_nearest_sizes_are_valid_and_keep_the_field_of_view(name, geometry):
    spec = model(name)
    near = spec.nearest(geometry)
    scaled = spec.scaled(geometry)
    assert 1 <= len(near) <= 2
    for each in (*near, scaled):
        assert spec.valid_size(each.size)
        assert each.fov_mm == pytest.approx(geometry.fov_mm, abs=1e-5)
    if spec.valid_size(geometry.size):
        assert near[0].size == geometry.size
        assert scaled is geometry


@usual
@given(NAMES, st.data(), st.integers(30, 600).map(lambda n: n / 100), st.integers(50, 400).map(lambda n: n / 100), st.booleans())
def test_the_spacing_that_a_refusal_names_is_accepted(name, data, x, z, head):
    spec = model(name)
    limits = spec.limits
    sides = limits.size_xy or range(limits.size_min, limits.size_max + 1, limits.multiple)
    side = data.draw(st.sampled_from([s[0] for s in limits.sizes] if limits.sizes else list(sides)))
    size = next(s for s in limits.sizes if s[0] == side) if limits.sizes else (side, side, (limits.size_z or (limits.size_max,))[0])
    low, high = limits.spacing_xy_mm
    assume(low <= x <= high and limits.spacing_z_mm[0] <= z <= limits.spacing_z_mm[1])
    geometry = Geometry(size=size, spacing=(x, x, z))
    refusal = None
    try:
        spec.check(geometry, modality=spec.modality, mode="image", head=head)
    except UsageError as error:
        refusal = error
    need = max(limits.fov_xy_min_mm, 0 if head else limits.fov_xy_good_mm)
    assert (refusal is None) is (min(geometry.fov_mm[:2]) >= need - 1e-6)
    if refusal is not None:
        spacing = named_spacing(refusal)
        assume(spacing[0] <= high)
        assert accepts(spec, size, spacing, head=head)
        assert not accepts(spec, size, (spacing[0] * 0.998, spacing[1] * 0.998, spacing[2]), head=head)
        assert spec.check(geometry, modality=spec.modality, mode="image", head=head, allow_ood=True) == [refusal.message]


def named_spacing(refusal: UsageError) -> tuple[float, float, float]:
    found = re.fullmatch(r"use --spacing (\S+) or larger, or --allow-ood", str(refusal.hint))
    assert found, refusal
    return parse_mm(found[1])


def test_the_spacing_that_is_named_is_rounded_up():
    spec = model("rflow-ct")
    with pytest.raises(UsageError) as caught:  # 320 mm over 384 voxels are 0.83333... mm
        spec.check(Geometry(size=(384, 384, 128), spacing=(0.7, 0.7, 1.0)), modality="ct", mode="image")
    assert named_spacing(caught.value) == (0.8334, 0.8334, 1)
    assert accepts(spec, (384, 384, 128), (0.8334, 0.8334, 1.0))
    assert not accepts(spec, (384, 384, 128), (0.8333, 0.8333, 1.0))


def test_a_small_field_of_view_is_fit_for_the_head_only():
    spec = model("rflow-ct")
    small, body = (0.6, 0.6, 2.0), (0.625, 0.625, 2.0)
    assert (accepts(spec, (512, 512, 128), small), accepts(spec, (512, 512, 128), small, head=True)) == (False, True)
    assert accepts(spec, (512, 512, 128), body)


TURNED = ((0.0, -1.5, 0.0, 10.0), (1.2, 0.0, 0.0, -20.0), (0.0, 0.0, 2.0, 5.0), (0.0, 0.0, 0.0, 1.0))


@usual
@given(
    st.sampled_from(["nano-ct", "rflow-ct", "ddpm-ct"]),
    st.tuples(*(st.integers(20, 700),) * 3),
    st.tuples(*(st.floats(0.3, 6.0),) * 3),
    st.booleans(),
)
def test_the_grid_on_which_a_mask_is_shown_is_one_of_the_models_and_cuts_nothing(name, size, spacing, turned):
    spec = model(name)
    geometry = Geometry(size=size, spacing=(1.2, 1.5, 2.0) if turned else spacing, affine_rows=TURNED if turned else None)
    limits = spec.limits
    try:
        grid = spec.shown_on(geometry)
    except UsageError:
        largest = [max(limits.size_xy or (limits.size_max,))] * 2 + [max(limits.size_z or (limits.size_max,))]
        most = [limits.spacing_xy_mm[1]] * 2 + [limits.spacing_z_mm[1]]
        assert any(fov > n * mm for fov, n, mm in zip(geometry.fov_mm, largest, most, strict=True))
        return
    assert spec.valid_size(grid.size)
    assert spec.shown_on(grid) == grid
    assert all(new >= old - 1e-6 for new, old in zip(grid.fov_mm, geometry.fov_mm, strict=True))
    for row, old in zip(grid.affine[:3], geometry.affine[:3], strict=True):
        centre, before = (r[3] + sum(r[k] * (n[k] - 1) / 2 for k in range(3)) for r, n in ((row, grid.size), (old, geometry.size)))
        half = max(geometry.spacing) if grid.spacing == geometry.spacing else 1e-6  # odd sizes are padded by whole voxels
        assert centre == pytest.approx(before, abs=half)
        assert [row[k] / grid.spacing[k] for k in range(3)] == pytest.approx([old[k] / geometry.spacing[k] for k in range(3)])


def test_a_mask_is_padded_where_the_model_pads_and_resampled_elsewhere():
    clinical = Geometry(size=(512, 512, 133), spacing=(0.7, 0.7, 2.5))
    shown = model("rflow-ct").shown_on(clinical)
    assert (shown.size, shown.spacing) == ((512, 512, 128), pytest.approx((0.7, 0.7, 332.5 / 128)))
    assert model("nano-ct").shown_on(clinical).size == (128, 128, 128)
    small = Geometry(size=(97, 101, 33), spacing=(3.0, 3.0, 3.0))
    assert model("nano-ct").shown_on(small) == small.around((112, 112, 48))
    fine = Geometry(size=(512, 512, 256), spacing=(0.4, 0.4, 0.4))  # the model's spacings begin at 0.5 mm: air around it
    assert model("rflow-ct").shown_on(fine).fov_mm == pytest.approx((256, 256, 128))


def test_modes_and_modalities_that_a_model_has_not_are_refused_with_what_has():
    with pytest.raises(UsageError, match="no weights that pair MR images") as caught:
        model("rflow-mr").check_mode("paired")
    assert caught.value.hint == "use --mode image"
    with pytest.raises(UsageError, match="mode"):
        model("rflow-ct").check_mode("both")
    with pytest.raises(UsageError, match="--model rflow-mr-brain"):
        model("rflow-mr").check_modality("mri-swi")
    with pytest.raises(UsageError, match="no model knows it"):
        model("rflow-ct").check_modality("mri-dwi")


# --- modalities ----------------------------------------------------------------------------


def test_modalities_are_the_classes_that_the_models_were_trained_with():
    classes = {
        0: "unknown", 1: "ct", 2: "ct_wo_contrast", 3: "ct_contrast", 8: "mri", 9: "mri_t1", 10: "mri_t2", 11: "mri_flair", 12: "mri_pd",
        13: "mri_dwi", 14: "mri_adc", 15: "mri_ssfp", 16: "mri_mra", 17: "mri_t1c", 20: "mri_swi", 29: "mri_t1_skull_stripped",
        30: "mri_t2_skull_stripped", 31: "mri_flair_skull_stripped", 32: "mri_swi_skull_stripped", 33: "mri_mra_skull_stripped",
    }  # fmt: skip
    assert {each.id: each.name.replace("-", "_") for each in modalities()} == classes
    assert all((each.kind == "mr") is (each.id >= 8) for each in modalities())


@pytest.mark.parametrize("text", ["mri-t1", "mr-t1", "MRI_T1", " MR T1 "])
def test_a_modality_is_found_however_it_is_spelt(text):
    assert modality(text).id == 9


def test_an_unknown_modality_gets_near_matches():
    with pytest.raises(UsageError, match="'mri-flair'"):
        modality("mri-flare")


def test_a_plugin_adds_a_modality(with_plugin):
    with_plugin(modalities={"mr-t1rho": {"id": 34, "kind": "mr"}})
    found = modality("MRI_T1rho")
    assert (found.id, found.kind, found.summary) == (34, "mr", "of a test")
    assert modalities()[-1] == found


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mr-new", {"id": 9, "kind": "mr"}),
        ("mri_t1", {"id": 34, "kind": "mr"}),
        ("mr-new", {"id": 128, "kind": "mr"}),
        ("mr-new", {"id": -1, "kind": "mr"}),
        ("mr-new", {"id": "x", "kind": "mr"}),
        ("mr-new", {"id": 34, "kind": "pet"}),
        ("mr-new", {"kind": "mr"}),
        ("mr-new", "mr"),
    ],
)
def test_modalities_that_clash_or_lack_something_are_refused_with_their_owner(name, row, with_plugin):
    with_plugin(modalities={name: row})
    with pytest.raises(UsageError, match="acme"):
        modalities()


# --- model files ---------------------------------------------------------------------------


def test_a_minimal_file_of_ones_own_is_a_model(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    spec = model(str(path))
    assert (spec.name, spec.modality, spec.modalities, spec.modes, spec.scheduler["name"]) == ("mine", "ct", ("ct",), ("image",), "rflow")
    assert not spec.installed("image")
    path = tmp_path / "control.toml"
    path.write_text(MINIMAL + '[networks.controlnet]\nkind = "controlnet_maisi"\n')
    assert model(str(path)).modes == ("paired", "image")


def test_a_file_of_ones_own_is_read_again_when_it_changes(tmp_path: Path):
    path = tmp_path / "mine.toml"
    for summary in ("one", "two"):
        path.write_text(MINIMAL.replace("[networks.vae]", f'summary = "{summary}"\n[networks.vae]'))
        assert model(str(path)).summary == summary


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema = ", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("", "is not a model file"),
        (MINIMAL.replace("model/1", "model/2"), "is not a model file"),
        (MINIMAL.replace("networks.vae", "networks.vea"), "did you mean 'vae'"),
        (MINIMAL.replace('"unet_maisi"', '"unet_mais"'), "networks.unet.kind is 'unet_mais'"),
        (MINIMAL.split("[networks.unet]")[0], r"has no \[networks.unet\]"),
        ('schema = "maisi.model/1"\nnetworks = 3\n', "networks is 3, not a table"),
        ('schema = "maisi.model/1"\nnetworks.vae = 3\n', "networks.vae is 3, not a table"),
        (MINIMAL.replace("[networks.vae]", "limits = 3\n[networks.vae]"), "limits is 3, not a table"),
        (MINIMAL.replace("[networks.vae]", 'weights = ["a"]\n[networks.vae]'), "weights is 'a', not a table"),
        (MINIMAL.replace("[networks.vae]", "colour = 3\n[networks.vae]"), "unknown key colour"),
        (MINIMAL.replace("[networks.vae]", 'modalities = ["ctt"]\n[networks.vae]'), "no modality named 'ctt'"),
        (MINIMAL + '[limits]\nsize_mn = 16\n', "did you mean 'size_min'"),
        (MINIMAL + '[limits]\nmultiple = 24\n', "size_min 32 does not divide by multiple 24"),
        (MINIMAL + '[limits]\nsize_max = 100\n', "size_max 100 does not divide by multiple 16"),
        (MINIMAL + '[licence]\nurl = "x"\n', "licence"),
        (MINIMAL + '[[weights]]\npart = "vea"\npath = "a"\n', "weights part 'vea'"),
        (MINIMAL + '[[weights]]\npart = "vae"\npath = "a"\nlayout = "pt"\n', "weights layout 'pt'"),
        (MINIMAL + '[[weights]]\npart = "vae"\n', "path"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_key_that_is_wrong(text, says, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=says):
        read_model(path)


def test_a_plugin_adds_a_model_under_the_name_in_its_file(with_plugin, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    with_plugin(models={"mine": path})
    assert model("mine").path == path
    assert "mine" in [spec.name for spec in models()]
    with_plugin(models={"yours": path})
    for find in (lambda: model("yours"), models):
        with pytest.raises(UsageError, match="'mine', but acme registers it as 'yours'"):
            find()


def test_weights_lie_in_the_home_folder_or_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    spec = model("rflow-mr")
    assert not spec.installed("image")
    for weight in spec.weights:
        path = spec.weight_path(weight)
        assert path == (tmp_path / "models" / "nvidia" / "NV-Generate-MR" / "main" / weight.path).with_suffix(".safetensors")
        assert not spec.installed("image")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert spec.installed("image")
    nano = model("nano-ct")
    assert all(nano.weight_path(weight).parent == nano.path.parent / "nano-ct" for weight in nano.weights)


def test_sizes_of_the_limits_are_whole_latents():
    for spec in models():
        limits = spec.limits
        sizes = [n for size in limits.sizes for n in size] or [*limits.size_xy, *limits.size_z] or [limits.multiple]
        assert math.gcd(*sizes) % spec.latent_factor == 0
