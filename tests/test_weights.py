"""Weight files: every released layout is read, nothing in them is run, and what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maisi_cli.catalog import model
from maisi_cli.cli import run
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.networks import build, load
from maisi_cli.testing import tiny_model
from maisi_cli.weights import load_state, locate, save_state, sha256_of, weights_home
from safetensors.torch import save_file
from torch import Tensor

from .golden import CPU, FP32, Shared, spec

# layout of each file of the goldens, and the scale factor that it holds
RELEASED = [
    ("autoencoder_v1.pt", "state_dict", "small_rflow_autoencoder_def"),
    ("autoencoder_v2.pt", "state_dict", "small_rflow_autoencoder_def"),
    ("diff_unet_3d_rflow-ct.pt", "unet", "small_rflow_diffusion_unet_def"),
    ("diff_unet_3d_ddpm-ct.pt", "unet", "small_ddpm_diffusion_unet_def"),
    ("controlnet_3d_rflow-ct.pt", "controlnet", "small_rflow_controlnet_def"),
    ("controlnet_3d_ddpm-ct.pt", "controlnet", "small_ddpm_controlnet_def"),
    ("mask_generation_autoencoder.pt", "state_dict", "small_rflow_mask_generation_autoencoder_def"),
    ("mask_generation_diffusion_unet.pt", "mask_unet", "small_rflow_mask_generation_diffusion_def"),
]


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout", "table"), RELEASED)
def test_every_released_layout_is_read(shared: Shared, name: str, layout: str, table: str) -> None:
    path = shared(f"golden/checkpoints/{name}")
    state = load_state(path, layout)
    wanted = json.loads(shared(f"golden/u70_state_dict_tables/{table}.json").read_text("utf-8"))
    assert {key: list(value.shape) for key, value in state.tensors.items()} == wanted
    assert (state.scale_factor is not None) == ("unet" in layout)
    assert state.sha256 == sha256_of(path)


def test_a_scale_factor_with_metadata_is_read_without_running_anything(shared: Shared) -> None:
    """The released UNets hold it as MONAI's MetaTensor."""
    state = load_state(shared("golden/u70_state_dict_tables/metatensor_scale_factor.pt"), "unet")
    assert state.scale_factor == pytest.approx(1.0946, abs=1e-6)
    assert state.tensors == {}


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "bomb.pt", tmp_path / "ran"
    content = {"unet_state_dict": {"a": torch.zeros(2)}, "extra": Bomb(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match="holds more than tensors"):
        load_state(path, "unet")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the trap does work
    assert mark.exists()


def refusal(path: Path) -> UsageError | None:
    try:
        load_state(path, "state_dict")
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize("end", [".pt", ".safetensors"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), keep=st.integers(0, 1500), flip=st.integers(0, 1500))
def test_damaged_files_are_refused(tmp_path: Path, end: str, content: bytes, keep: int, flip: int) -> None:
    """Random bytes, and the beginning of a good file with one byte changed: refused in a line, or read if nothing is lost."""
    good = tmp_path / f"good{end}"
    if not good.exists():
        tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3)}
        save_file(tensors, good, metadata={"scale_factor": "1.5"}) if end == ".safetensors" else torch.save(tensors, good)
    whole = bytearray(good.read_bytes())
    whole[flip % len(whole)] ^= 0x55
    bad = tmp_path / f"bad{end}"
    for data in (content, bytes(whole[:keep]), bytes(whole)):
        bad.write_bytes(data)
        error = refusal(bad)
        assert error is None or (str(bad) in error.message and "\n" not in error.message)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content in (torch.zeros(3), [torch.zeros(3)], {"epoch": 3, "unet_state_dict": {"a": torch.zeros(3)}}, {3: torch.zeros(3)}):
        torch.save(content, path)
        with pytest.raises(UsageError, match="layout 'controlnet'"):
            load_state(path, "controlnet")


@pytest.mark.parametrize("scale", ["much", torch.zeros(3), 0.0, float("nan"), -1.0])
def test_a_scale_factor_that_is_no_positive_number_is_refused(tmp_path: Path, scale: Any) -> None:
    torch.save({"unet_state_dict": {"a": torch.zeros(3)}, "scale_factor": scale}, tmp_path / "weights.pt")
    save_file({"a": torch.zeros(3)}, tmp_path / "weights.safetensors", metadata={"scale_factor": str(scale)})
    for end in ("pt", "safetensors"):
        with pytest.raises(UsageError, match="scale factor"):
            load_state(tmp_path / f"weights.{end}", "unet")


# --- writing ------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "n": torch.arange(5), "b": torch.tensor(1 / 3)}
    full = load_state(save_state(tmp_path / "full.safetensors", tensors, metadata={"scale_factor": "1.25"}, half=False))
    assert full.scale_factor == 1.25
    assert all(torch.equal(full.tensors[key], value) for key, value in tensors.items())
    half = load_state(save_state(tmp_path / "half.safetensors", tensors, metadata={}))
    assert half.scale_factor is None
    assert half.tensors["a"].dtype == torch.float16
    assert torch.equal(half.tensors["a"], tensors["a"].half())
    assert torch.equal(half.tensors["n"], tensors["n"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.safetensors", "half.safetensors"]


def test_missing_weights_name_the_command_that_fetches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path))
    with pytest.raises(CannotRun, match="diff_unet_3d_rflow-mr") as caught:
        locate(model("rflow-mr"), ("unet", "vae"))
    assert caught.value.hint == "maisi models pull rflow-mr"
    with pytest.raises(UsageError, match="lists no weights for its controlnet"):
        locate(model("rflow-mr"), ("controlnet",))
    path = weights_home() / "nvidia" / "NV-Generate-MR" / "main" / "models" / "autoencoder_v2.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert locate(model("rflow-mr"), ("vae",)) == {"vae": path}


# --- weights into networks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def lose(tensors: dict[str, Tensor]) -> str:
    del tensors["conv_in.conv.weight"]
    return "1 keys missing, 0 unexpected, 0 of another shape (missing conv_in.conv.weight)"


def add(tensors: dict[str, Tensor]) -> str:
    tensors["extra.weight"] = torch.zeros(3)
    return "0 keys missing, 1 unexpected, 0 of another shape (unexpected extra.weight)"


def add_projection(tensors: dict[str, Tensor]) -> str:
    """The excess keys of the ddpm-ct files belong to blocks that there are."""
    tensors["nowhere.attn.out_proj.weight"] = torch.zeros(3)
    return "0 keys missing, 1 unexpected, 0 of another shape (unexpected nowhere.attn.out_proj.weight)"


def reshape(tensors: dict[str, Tensor]) -> str:
    tensors["conv_in.conv.weight"] = torch.zeros(8, 4, 3, 3, 1)
    return "0 keys missing, 0 unexpected, 1 of another shape (conv_in.conv.weight is 8x4x3x3x1, not 8x4x3x3x3)"


@pytest.mark.parametrize("change", [lose, add, add_projection, reshape])
def test_weights_that_do_not_fit_are_refused_with_exit_code_2(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in tiny.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "unet.safetensors"
    tensors = dict(load_state(path).tensors)
    said = change(tensors)
    path.unlink()
    save_state(path, tensors, metadata={}, half=False)
    words = ["generate", "--model", str(tmp_path / "tiny.toml"), "--size", "32x32x32", "--spacing", "12x12x12", "--seed", "1", "-q"]
    assert run([*words, "--mode", "image"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {path} does not fit its network: {said}", "  check that file and model belong together"]


def test_weights_of_the_other_family_are_refused(shared: Shared) -> None:
    """The reference loads the UNet with strict=False; what it cannot load has other shapes."""
    rflow, ddpm = spec(shared, "rflow"), spec(shared, "ddpm")
    for here, other in ((rflow, ddpm), (ddpm, rflow)):
        files = {weight.part: other.weight_path(weight) for weight in other.weights}
        with pytest.raises(UsageError, match="keys missing"):
            load(here, ["unet"], device=CPU, precision=FP32, files=files)


def test_the_unused_projections_of_ddpm_ct_are_dropped(shared: Shared, tmp_path: Path) -> None:
    """The released ddpm-ct files hold output projections of the attention that were never applied (MONAI issue 7991)."""
    ddpm, rflow = spec(shared, "ddpm"), spec(shared, "rflow")
    weight = next(weight for weight in ddpm.weights if weight.part == "unet")
    content = torch.load(ddpm.weight_path(weight), weights_only=True)
    state = content["unet_state_dict"]
    queries = [key for key in state if key.endswith(".attn.to_q.weight")]
    assert queries
    for key in queries:
        stem, width = key.removesuffix("to_q.weight"), len(state[key])
        state[f"{stem}out_proj.weight"], state[f"{stem}out_proj.bias"] = torch.ones(width, width), torch.ones(width)
    torch.save(content, tmp_path / "unet.pt")
    loaded = load(ddpm, ["unet"], device=CPU, precision=FP32, files={"unet": tmp_path / "unet.pt"}).parts["unet"].state_dict()
    assert not [key for key in loaded if "out_proj" in key]
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    applied = [key for key in build(rflow.networks["unet"]).state_dict() if ".attn.out_proj." in key]
    assert len(applied) == 2 * len(queries)  # where they are applied they are wanted


def test_the_scale_factor_of_the_unet_s_file_comes_first(tiny: Path, tmp_path: Path) -> None:
    model_spec = model(str(tiny))
    files = {weight.part: model_spec.weight_path(weight) for weight in model_spec.weights}
    assert load(model_spec, ["unet"], device=CPU, precision=FP32, files=files).scale_factor == 1.0
    state = load_state(files["unet"])
    files["unet"] = save_state(tmp_path / "unet.safetensors", state.tensors, metadata={"scale_factor": "0.75"})
    loaded = load(model_spec, ["unet", "vae"], device=CPU, precision=FP32, files=files)
    assert loaded.scale_factor == 0.75
    assert loaded.hashes == {part: sha256_of(files[part]) for part in ("unet", "vae")}
    assert not any(parameter.requires_grad for network in loaded.parts.values() for parameter in network.parameters())
    assert not any(network.training for network in loaded.parts.values())
    bare = dataclasses.replace(model_spec, scale_factor=None)
    with pytest.raises(UsageError, match="no scale factor"):
        load(bare, ["vae"], device=CPU, precision=FP32, files=files)
    with pytest.raises(UsageError, match="has no mask_unet"):
        load(model_spec, ["mask_unet"], device=CPU, precision=FP32, files=files)
