"""`train dm` and `train controlnet`: the reference's numbers, the region-contrastive loss, DDPM, new labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli import anatomy, cli, networks
from maisi_cli.errors import UsageError
from maisi_cli.repair import without_lesions
from maisi_cli.sampling import ddpm_alphas
from maisi_cli.testing import filled, tiny_model
from maisi_cli.train import TrainSettings, contrastive, diffusion, vocabulary
from maisi_cli.train.controlnet import ControlNetTask, Pair
from maisi_cli.train.diffusion import DiffusionTask
from maisi_cli.weights import load_state, save_state
from torch import Tensor

from . import golden

Shared = Callable[[str], Path]
CYST = 133
SPACING = torch.tensor([[150.0, 150.0, 200.0]])
"""That of the reference's cases, which do not tell it: with it their outputs are met."""


# --- against the reference ------------------------------------------------------------------------


@pytest.fixture
def case63(shared: Shared) -> golden.Golden:
    return golden.case(shared, "t63_train_controlnet_rflow")


def small(shared: Shared, part: str, file: str) -> tuple[Any, float]:
    """Return a small network of the cases with its weights, and its scale factor."""
    network = networks.build(golden.spec(shared, "rflow").networks[part])
    state = load_state(shared(f"golden/checkpoints/{file}"), part)
    network.load_state_dict({key: value.float() for key, value in state.tensors.items()})
    return network, float(state.scale_factor or 0)


def labels_of(case: golden.Golden, name: str) -> Tensor:
    return case.tensor(name).to(torch.uint8).reshape(1, 1, 64, 64, 64)


def test_the_terms_of_the_controlnet_s_loss_are_the_reference_s(case63: golden.Golden, shared: Shared) -> None:
    _, scale = small(shared, "unet", "diff_unet_3d_rflow-ct.pt")
    labels, without = labels_of(case63, "label"), labels_of(case63, "roi_free_labels")
    made, free = case63.tensor("model_output_0"), case63.tensor("model_output_roi_free_0")
    target = case63.tensor("image_0") * scale - case63.draws[0]
    told = case63.meta["scalars"]["steps"][0]
    weights = contrastive.weights(labels, {23}, 100, made.shape[2:])
    assert float(((made - target).abs() * weights).mean()) == pytest.approx(told["weighted_l1"], rel=1e-6)
    changed, same = contrastive.regions(labels, without, made.shape[2:])
    assert int(changed.sum()) == told["roi_voxels"]
    assert float(contrastive.foreground(made, free, changed, 2.0)) == pytest.approx(told["region"], rel=1e-6)
    assert float(contrastive.background(free, target, same)) == pytest.approx(told["region_bg"], rel=1e-6)


def test_whole_steps_of_the_controlnet_are_the_reference_s(case63: golden.Golden, shared: Shared) -> None:
    """Three steps from the same weights, noise and times: losses and gradients (one pass for both masks, the way down once)."""
    unet, scale = small(shared, "unet", "diff_unet_3d_rflow-ct.pt")
    net, _ = small(shared, "controlnet", "controlnet_3d_rflow-ct.pt")
    told = case63.meta["scalars"]
    unet.requires_grad_(False).eval()
    labels, without = labels_of(case63, "label"), labels_of(case63, "roi_free_labels")
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for k, step in enumerate(told["steps"]):
        latent, noise, u = case63.tensor(f"image_{k}") * scale, case63.draws[2 * k], case63.draws[2 * k + 1]
        times = diffusion.shifted(u, [16**3])
        assert times.tolist() == pytest.approx(step["t"], rel=1e-5)
        inputs = {"spacing_tensor": SPACING, "class_labels": torch.ones(1, dtype=torch.long)}
        made, free = Pair(net, unet)(diffusion.mix(latent, noise, times), times, [labels, without], inputs).split(1)
        if k == 0:
            torch.testing.assert_close(made, case63.tensor("model_output_0"), rtol=1e-3, atol=1e-4)
        target = latent - noise
        weights = contrastive.weights(labels, {23}, 100, made.shape[2:])
        changed, same = contrastive.regions(labels, without, made.shape[2:])
        loss = ((made - target).abs() * weights).mean() + 0.01 * (
            contrastive.foreground(made, free, changed, 2.0) + contrastive.background(free, target, same)
        )
        assert float(loss.detach()) == pytest.approx(step["loss"], rel=1e-4)
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - k / 40) ** 2
        optimiser.zero_grad()
        loss.backward()
        grads = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
        assert float(grads.norm()) == pytest.approx(step["grad_l2"], rel=1e-3)
        optimiser.step()


def test_steps_of_the_diffusion_model_are_the_reference_s(shared: Shared) -> None:
    case = golden.case(shared, "t61_train_dm_rflow")
    unet, _ = small(shared, "unet", "diff_unet_3d_rflow-ct.pt")
    told, scale = case.meta["scalars"]["steps"], case.meta["scalars"]["scale_factor"]
    optimiser = torch.optim.Adam(unet.parameters(), lr=1e-3)
    losses = []
    for k, step in enumerate(told):
        draws = case.draws[5 * k : 5 * k + 5]
        modalities = torch.tensor(case.meta["scalars"]["modality"][k])
        kind = torch.where((modalities >= 2) & (modalities <= 7) & (draws[0] < 0.1), 1, modalities)
        kind = torch.where((kind >= 9) & (draws[1] < 0.1), 8, kind)
        kind = torch.where(draws[2] < 0.1, 0, kind)
        latent, noise = case.tensor(f"image_{k}") * scale, draws[3]
        times = diffusion.shifted(draws[4], [16 * 16 * 8] * 2)
        made = unet(x=diffusion.mix(latent, noise, times), timesteps=times, spacing_tensor=SPACING.repeat(2, 1), class_labels=kind)
        loss = (made - (latent - noise)).abs().mean()
        losses.append(float(loss.detach()))
        optimiser.param_groups[0]["lr"] = step["lr"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses == pytest.approx([step["loss"] for step in told], rel=3e-3)  # the case does not tell its spacings


# --- closed forms --------------------------------------------------------------------------------------


def test_regions_are_where_masks_differ_and_a_voxel_away_where_they_do_not() -> None:
    labels = torch.ones(1, 1, 16, 16, 16, dtype=torch.uint8)
    lesion = labels.clone()
    lesion[..., 4:9, 4:9, 4:9] = 26
    changed, same = contrastive.regions(lesion, labels, (4, 4, 4))
    assert changed.nonzero()[:, 2:].tolist() == [[i, j, k] for i in (1, 2) for j in (1, 2) for k in (1, 2)]
    grown = torch.zeros(16, dtype=torch.bool)
    grown[3:10] = True
    inside = grown[::4]
    assert torch.equal(same[0, 0] == 0, inside[:, None, None] & inside[None, :, None] & inside[None, None, :])


@given(st.floats(0, 6), st.floats(0.1, 3))
def test_the_foreground_counts_no_further_than_its_delta(apart: float, delta: float) -> None:
    where = torch.ones(1, 1, 2, 2, 2)
    loss = float(contrastive.foreground(torch.full((1, 4, 2, 2, 2), apart), torch.zeros(1, 4, 2, 2, 2), where, delta))
    assert loss == pytest.approx(-min(apart, delta), abs=1e-3)


def test_without_a_region_nothing_is_divided_by_nothing() -> None:
    nowhere = torch.zeros(1, 1, 2, 2, 2)
    values = torch.randn(1, 4, 2, 2, 2)
    assert float(contrastive.foreground(values, 2 * values, nowhere, 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(contrastive.background(values, 2 * values, nowhere)) == 0


def test_ddpm_s_noise_has_the_schedule_s_variance() -> None:
    times = torch.tensor([0, 499, 999])
    data, noise = torch.zeros(3, 1, 4, 4, 4), torch.ones(3, 1, 4, 4, 4)
    made = diffusion.diffuse(data, noise, times)[:, 0, 0, 0, 0]
    torch.testing.assert_close(made.square(), 1 - ddpm_alphas()[times])
    torch.testing.assert_close(diffusion.diffuse(noise, data, times)[:, 0, 0, 0, 0].square(), ddpm_alphas()[times])


@pytest.mark.parametrize(("modality", "kind"), [(1, 1), (2, 1), (7, 1), (8, 8), (9, 8), (29, 8)])
def test_a_special_modality_becomes_its_kind_and_now_and_then_none(modality: int, kind: int) -> None:
    rng = np.random.default_rng(0)
    assert diffusion.generalised(modality, rng, share=1.0, dropout=0.0) == kind
    assert diffusion.generalised(modality, rng, share=0.0, dropout=0.0) == modality
    assert diffusion.generalised(modality, rng, share=0.0, dropout=1.0) == 0
    drawn = [diffusion.generalised(modality, rng, share=0.1, dropout=0.1) for _ in range(4000)]
    assert drawn.count(0) / 4000 == pytest.approx(0.1, abs=0.02)


# --- on tiny networks -----------------------------------------------------------------------------------


def write_cases(folder: Path, count: int = 4, *, label: int = 26, size: int = 8, **more: Any) -> Path:
    """Write latents and labels of `count` cases, the first held out; a cube of `label` in liver."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(count):
        rng = np.random.default_rng(k)
        labels = np.full((4 * size,) * 3, 200, np.uint8)
        labels[4:28, 4:28, 4:28] = 1
        low = int(rng.integers(8, 14))
        labels[low : low + 8, low : low + 8, low : low + 8] = label
        latent = rng.normal(0, 0.3, (4, size, size, size)).astype(np.float16)
        latent[0] += labels[::4, ::4, ::4] == label
        np.save(folder / f"c{k}_latent.npy", latent)
        np.save(folder / f"c{k}_labels.npy", labels)
        rows.append({"id": f"c{k}", "latent": f"c{k}_latent.npy", "label": f"c{k}_labels.npy", "spacing": [2, 2, 2], "modality": "ct",
                     "fold": 0 if k == 0 else 1, **more})  # fmt: skip
    path = folder / "latents.json"
    path.write_text(json.dumps({"training": rows}))
    return path


def renamed(path: Path) -> Path:
    """Give the cases of a list other names."""
    rows = json.loads(path.read_text())["training"]
    path.write_text(json.dumps({"training": [{**row, "id": f"old{k}"} for k, row in enumerate(rows)]}))
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    anatomy.maisi.cache_clear()
    path = tiny_model(tmp_path / "model")
    torch.manual_seed(3)
    spec = diffusion.find_model(str(path))
    unet = filled(networks.build(spec.networks["unet"]))
    save_state(tmp_path / "unet.safetensors", unet.state_dict(), metadata={"scale_factor": "1.25"}, half=False)
    yield path
    anatomy.maisi.cache_clear()


def settings_of(model: Path, kind: str = "controlnet", **changes: Any) -> TrainSettings:
    base = {"kind": kind, "model": str(model), "crops": ((8, 8, 8),), "batch_size": 2, "seed": 1}
    if kind == "controlnet":
        base["unet"] = str(model.parent.parent / "unet.safetensors")
    return TrainSettings(**{**base, **changes})


def test_both_masks_are_predicted_as_by_two_calls_and_the_way_down_runs_once(model: Path, tmp_path: Path) -> None:
    task = ControlNetTask(settings_of(model, contrastive_weight=0.01), write_cases(tmp_path / "data"))
    filled(task.network)
    batch = task.batch(np.random.default_rng(0))
    assert torch.equal(batch["without"], torch.from_numpy(np.stack([without_lesions(each.numpy()[0])[None] for each in batch["labels"]])))
    calls = {"down": 0, "controlnet": 0}
    original, forward = task.unet._apply_down_blocks, task.network.forward

    def down(*given: Any) -> Any:
        calls["down"] += 1
        return original(*given)

    def control(**given: Any) -> Any:
        calls["controlnet"] += 1
        return forward(**given)

    task.unet._apply_down_blocks, task.network.forward = down, control  # type: ignore[method-assign,assignment]
    x, times = torch.randn(2, 4, 8, 8, 8), torch.tensor([300.0, 700.0])
    both = Pair(task.network, task.unet)(x, times, [batch["labels"], batch["without"]], task.inputs(batch))
    assert calls == {"down": 1, "controlnet": 1}
    torch.manual_seed(0)
    loss, figures = task.loss(task.network, batch)
    assert calls == {"down": 2, "controlnet": 2}
    assert set(figures) == {"distance", "foreground", "background"}
    assert bool(torch.isfinite(loss))
    del task.unet._apply_down_blocks, task.network.forward
    for made, labels in zip(both.split(2), (batch["labels"], batch["without"]), strict=True):
        inputs = task.inputs(batch)
        down_, middle = task.network(x=x, timesteps=times, controlnet_cond=networks.binarise(labels), class_labels=inputs["class_labels"])
        alone = task.unet(x=x, timesteps=times, **inputs, down_block_additional_residuals=[each.clone() for each in down_],
                          mid_block_additional_residual=middle)  # fmt: skip
        torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-5)


def test_weighted_labels_count_so_many_times(model: Path, tmp_path: Path) -> None:
    task = ControlNetTask(
        settings_of(model, weighted_labels=("hepatic tumor",), weighted_loss=50.0, loss="l1"), write_cases(tmp_path / "data")
    )
    batch = task.batch(np.random.default_rng(0))
    share = float((contrastive.nearest(batch["labels"], (8, 8, 8)) == 26).float().mean())
    assert 0 < share < 0.2
    ones = torch.ones_like(batch["latent"])
    assert float(task.weighted_distance(ones, 0 * ones, batch["labels"])) == pytest.approx(1 + 49 * share, rel=1e-5)
    with torch.no_grad():
        assert "weighted" in task.validate(task.network)


def test_contrast_needs_lesions_and_weights_need_their_label(model: Path, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", label=3)
    with pytest.raises(UsageError, match="no training case has one"):
        ControlNetTask(settings_of(model, contrastive_weight=0.01), data)
    with pytest.raises(UsageError, match="no training case has a lung tumor"):
        ControlNetTask(settings_of(model, weighted_labels=("lung tumor",)), data)
    with pytest.raises(UsageError, match="lung tumour x"):
        ControlNetTask(settings_of(model, weighted_labels=("lung tumour x",)), data)


def test_a_ddpm_model_is_told_regions_and_learns_noise(model: Path, tmp_path: Path) -> None:
    text = model.read_text().replace('name = "rflow"', 'name = "ddpm"')
    assert 'name = "ddpm"' in text
    other = model.with_name("ddpm.toml")
    other.write_text(text)
    task = DiffusionTask(settings_of(other, "dm", modality_dropout=0.0), write_cases(tmp_path / "data"))
    assert task.ddpm
    batch = task.batch(np.random.default_rng(0))
    torch.manual_seed(0)
    latent, times, noise = task.noised(batch)
    assert times.dtype == torch.long
    assert torch.equal(task.target(latent, noise), noise)
    torch.testing.assert_close(task.at(latent, noise, times), diffusion.diffuse(latent, noise, times))
    with torch.no_grad():
        assert task.validate(task.network)["score"] > 0


def test_scales_are_told_with_their_spread_and_kept_when_fine_tuning(model: Path, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data")
    fresh = DiffusionTask(settings_of(model, "dm"), data)
    low, high = diffusion.spread_of_scales(fresh.cases)
    assert low <= fresh.scale <= high
    assert f"of single ones {low:.4f} to {high:.4f}" in fresh.notes[0]
    tuned = DiffusionTask(settings_of(model, "dm", init=str(tmp_path / "unet.safetensors")), data)
    assert tuned.scale == 1.25
    assert any("1.2500 as in" in note for note in tuned.notes)


def test_weights_that_fit_in_part_are_taken_only_when_asked(model: Path, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data")
    state = load_state(tmp_path / "unet.safetensors")
    some = {key: value for key, value in state.tensors.items() if not key.startswith("out.")}
    save_state(tmp_path / "some.safetensors", some, metadata={}, half=False)
    with pytest.raises(UsageError, match=r"out\."):
        DiffusionTask(settings_of(model, "dm", init=str(tmp_path / "some.safetensors")), data)
    task = DiffusionTask(settings_of(model, "dm", init=str(tmp_path / "some.safetensors"), init_partial=True), data)
    assert any(f"{len(some)} of {len(state.tensors)} tensors" in note for note in task.notes)
    save_state(tmp_path / "none.safetensors", {"strange": torch.zeros(1)}, metadata={}, half=False)
    with pytest.raises(UsageError, match="no weight that fits"):
        DiffusionTask(settings_of(model, "dm", init=str(tmp_path / "none.safetensors"), init_partial=True), data)


# --- new labels ------------------------------------------------------------------------------------------


def added(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(line)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_label_is_added_known_and_never_twice(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = added(["labels", "add", "pancreatic cyst", "--id", "133", "--group", "cyst", "--host", "pancreas"], capsys)
    assert (code, out) == (0, "133  pancreatic cyst\n")
    assert anatomy.maisi().id("pancreatic cyst") == CYST
    assert added(["labels", "add", "stent", "--json"], capsys)[0] == 0
    assert anatomy.maisi().id("stent") == 134
    before = (tmp_path / "labels.toml").read_text()
    for line, says in [
        (["labels", "add", "liver"], "name of label 1"), (["labels", "add", "other", "--id", "26"], "already 'hepatic tumor'"),
        (["labels", "add", "other", "--id", "200"], "already"), (["labels", "add", "other", "--id", "256"], "has id 256"),
        (["labels", "add", "other", "--group", "cyst"], "lies in an organ"), (["labels", "add", "Pancreatic-Cyst"], "name of label 133"),
        (["labels", "add", "other", "--group", "cyst", "--host", "livre"], "liver"),
    ]:  # fmt: skip
        code, out, err = added(line, capsys)
        assert (code, out) == (2, ""), line
        assert says in err
        assert (tmp_path / "labels.toml").read_text() == before
    assert added(["labels", "add", "prostate tumor", "--id", "16", "--group", "tumor", "--host", "prostate"], capsys)[0] == 0
    assert anatomy.maisi().name_of(16) == "prostate tumor"  # in the place of a dummy
    (tmp_path / "labels.toml").write_text("[x")
    anatomy.maisi.cache_clear()
    with pytest.raises(UsageError, match="not a file of labels"):
        anatomy.maisi()


def test_labels_are_counted_by_split_and_strange_ones_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_cases(tmp_path / "data", label=CYST)
    with pytest.raises(UsageError, match="133, which the vocabulary does not"):
        ControlNetTask(settings_of(model), data)
    added(["labels", "add", "pancreatic cyst", "--id", "133", "--group", "cyst", "--host", "pancreas"], capsys)
    task = ControlNetTask(settings_of(model), data)
    assert task.voxels["training"][CYST] == 3 * 8**3
    assert f"pancreatic cyst (133): {3 * 8**3} voxels in training, {8**3} held out" in task.notes
    assert json.loads(task.metadata("controlnet")["labels"]) == {"liver": 1, "pancreatic cyst": 133, "body": 200}
    empty: Mapping[str, Mapping[int, int]] = {"training": {0: 5, CYST: 1}, "held out": {0: 4}}
    assert any("nothing tells how well" in line for line in vocabulary.told(empty, anatomy.maisi()))


def test_what_was_learned_before_is_replayed(model: Path, tmp_path: Path) -> None:
    new, old = write_cases(tmp_path / "new", label=26), write_cases(tmp_path / "old", label=24)
    renamed(old)
    task = ControlNetTask(settings_of(model, replay=str(old), replay_share=0.3, batch_size=1), new)
    rng = np.random.default_rng(0)
    drawn = [task.draw_case(rng).id.startswith("old") for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.04)
    assert "old0" not in {case.id for case in task.replayed}  # held out there


@pytest.mark.slow
def test_a_new_label_is_learned_where_the_mask_says_and_old_ones_are_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new class brightens the first latent channel where its mask lies; the loss on old cases rises by less than 15 %."""
    added(["labels", "add", "pancreatic cyst", "--id", "133", "--group", "cyst", "--host", "liver"], capsys)
    old, new = write_cases(tmp_path / "old", label=26), write_cases(tmp_path / "new", label=CYST)
    renamed(old)
    from maisi_cli.train import train

    common = {"train.model": str(model), "train.crops": [[8, 8, 8]], "train.batch_size": 4, "train.lr": 3e-3, "train.loss": "l2",
              "train.precision": "no", "train.max_minutes": None, "train.validate_every": 200, "train.save_every": 1000,
              "train.time_shift": 1.0, "train.warmup_steps": 10, "train.ema_decay": 0.98}  # fmt: skip
    first = train("controlnet", data=old, out=tmp_path / "first", preset="nano-controlnet",
                  overrides={**common, "train.steps": 300, "train.unet": str(tmp_path / "unet.safetensors")})  # fmt: skip
    unet = first.with_name("unet.safetensors")
    second = train("controlnet", data=new, out=tmp_path / "second", preset="nano-controlnet",
                   overrides={**common, "train.steps": 300, "train.unet": str(unet), "train.init": str(first), "train.train_unet": False,
                              "train.replay": str(old), "train.replay_share": 0.5})  # fmt: skip

    def look(weights: Path, data: Path) -> tuple[float, float]:
        """Return the held-out loss, and how much brighter the first channel is predicted where the label lies."""
        task = ControlNetTask(settings_of(model, unet=str(unet), init=str(weights)), data)
        batch = task.held_batch(task.held[0], torch.device("cpu"))
        noise = torch.randn(batch["latent"].shape, generator=torch.Generator().manual_seed(9))
        at = torch.tensor([900.0])
        with torch.no_grad():
            clean = task.predict(task.network, task.at(batch["latent"], noise, at), at, batch) + noise
            score = task.validate(task.network)["score"]
        inside = torch.isin(contrastive.nearest(batch["labels"], (8, 8, 8))[0, 0], torch.tensor([26.0, CYST]))
        return score, float(clean[0, 0][inside].mean() - clean[0, 0][~inside].mean()) / task.scale

    old_before, _ = look(first, old)
    old_after, kept = look(second, old)
    _, bright_before = look(first, new)
    _, bright_after = look(second, new)
    sys.stdout.write(
        f"\nnew label {bright_before:.2f} to {bright_after:.2f}, old {kept:.2f}, loss of old {old_before:.3f} to {old_after:.3f}\n"
    )
    assert bright_after > 0.3  # the truth is 1
    assert bright_after > bright_before + 0.1
    assert bright_after > 0.9 * kept  # as well as the old one
    assert kept > 0.3
    assert old_after < 1.15 * old_before
