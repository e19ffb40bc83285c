"""The pipeline with networks of random weights: files, seeds, retries, resuming and refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from maisi_cli import quality, synthesis
from maisi_cli.cli import run
from maisi_cli.errors import CannotRun, Rejected, UsageError
from maisi_cli.events import ignore
from maisi_cli.files import writes
from maisi_cli.geometry import Geometry
from maisi_cli.hookspecs import Register, hookimpl
from maisi_cli.plugins import load
from maisi_cli.record import sha256_of
from maisi_cli.sampling import Schedule, flow_schedule
from maisi_cli.settings import GenerateSettings, resolve
from maisi_cli.synthesis import Job, run_local
from maisi_cli.testing import tiny_model
from maisi_cli.volumes import Mask, Sample, read_mask, write_mask


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.chdir(tmp_path)


SMALL = {"size": "32x32x32", "spacing": "12x12x12", "seed": 5, "out": "run", "on_qc_fail": "keep", "name": "s{index}", "preview": False}


def make(model: str, **values: Any) -> list[Sample]:
    return list(synthesis.generate(**{**SMALL, "model": model, **values}))


def test_a_sample_has_files_that_agree(model: str) -> None:
    sample = make(model, preview=True, keep_latent=True)[0]
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "labels.json", "s0_image.nii.gz", "s0_label.nii.gz", "s0_latent.npy", "s0_preview.png", "s0_record.json"]  # fmt: skip
    image, label = nibabel.load(sample.paths["image"]), nibabel.load(sample.paths["label"])
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
    assert np.array_equal(image.affine, label.affine)
    array, labels = np.asarray(image.dataobj), np.asarray(label.dataobj)
    assert (array[labels == 0] == -1000).all()
    assert array.min() >= -1000
    assert array.max() <= 1000
    assert 200 in labels
    record = json.loads(sample.paths["record"].read_text())
    assert record["outputs"]["image"]["sha256"] == sha256_of(sample.paths["image"])
    assert set(record["timing"]["seconds"]) == {"mask", "denoise", "decode", "save"}
    assert [part["part"] for part in record["model"]["weights"]] == ["vae", "unet", "controlnet"]


def test_a_sample_depends_on_seed_and_index_alone(model: str) -> None:
    batch = make(model, count=3, out="batch")
    shard = make(model, count=3, out="shard", shard="3/3")
    again = make(model, count=3, out="again", config=None)
    assert [sample.index for sample in shard] == [2]
    for kind in ("image", "label"):
        assert batch[2].paths[kind].read_bytes() == shard[0].paths[kind].read_bytes()
        assert batch[1].paths[kind].read_bytes() == again[1].paths[kind].read_bytes()
        assert batch[0].paths[kind].read_bytes() != batch[1].paths[kind].read_bytes()


def test_labels_keep_their_ids_and_the_whole_mask_is_saved(model: str) -> None:
    """The reference saves positions in the list of organs, and nothing else (number 16)."""
    saved: dict[str, np.ndarray] = {}
    for out, values in (("ours", {}), ("theirs", {"compat": "reference"})):
        sample = make(model, mode="mask", anatomy="spleen,liver", out=out, **values)[0]
        saved[out] = np.asarray(nibabel.load(sample.paths["label"]).dataobj)
    ids = set(np.unique(saved["ours"]).tolist())
    assert {1, 3, 200} < ids
    assert len(ids) > 10  # what nobody asked for is there too
    spleen, liver = saved["ours"] == 3, saved["ours"] == 1
    assert np.array_equal(saved["theirs"], np.where(spleen, 1, np.where(liver, 2, 0)))


@pytest.mark.parametrize("values", [{"mode": "image"}, {}, {"compat": "reference"}], ids=["image", "paired", "compat"])
def test_every_path_saves_hu_rounded_to_int16(model: str, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    """The reference saves float32 with a mask, and truncated int16 without (number 38)."""
    whole: list[Any] = []
    decode = synthesis.decoding.decode_image

    def decoder(nets: Any, latent: torch.Tensor, modality: str, **how: Any) -> Any:
        whole.append(synthesis.decoding.to_hu(synthesis.decoding.decode(nets, latent, **how), modality))
        return decode(nets, latent, modality, **how)

    monkeypatch.setattr(synthesis.decoding, "decode_image", decoder)
    sample = make(model, **values)[0]
    assert sample.image is not None
    made, stored = sample.image.array, nibabel.load(sample.paths["image"])
    assert (made.dtype, stored.get_data_dtype()) == (np.int16, np.int16)
    assert np.array_equal(np.asarray(stored.dataobj), made)
    hu = whole[0] if sample.mask is None else np.where(sample.mask.array == 0, -1000, whole[0])
    assert np.array_equal(made, np.rint(hu))
    assert (np.rint(hu) != np.trunc(hu)).mean() > 0.01  # truncating would be another image


@pytest.mark.parametrize("compat", [None, "reference"])
def test_the_sampler_gets_the_corrected_times_and_the_reference_s_in_compatibility(
    model: str, monkeypatch: pytest.MonkeyPatch, compat: str | None
) -> None:  # fmt: skip
    """Number 37: its steps add up to more than the path. What the decoder is given is float32 either way (number 39)."""
    given: list[Schedule] = []
    noises: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []
    euler, decode = synthesis.sampling.euler, synthesis.decoding.decode_image

    def sampler(denoise: Any, noise: Any, schedule: Schedule, **how: Any) -> torch.Tensor:
        given.append(schedule)
        noises.append(noise)
        return euler(denoise, noise, schedule, **how)

    def decoder(nets: Any, latent: torch.Tensor, modality: str, **how: Any) -> Any:
        latents.append(latent)
        return decode(nets, latent, modality, **how)

    monkeypatch.setattr(synthesis.sampling, "euler", sampler)
    monkeypatch.setattr(synthesis.decoding, "decode_image", decoder)
    make(model, steps=4, compat=compat)
    wanted = flow_schedule(4, (8, 8, 8), compat=compat is not None)
    assert given[0].times.tolist() == wanted.times.tolist()
    assert given[0].widths.tolist() == wanted.widths.tolist()
    assert (float(given[0].widths.sum()) == pytest.approx(1, abs=1e-9)) is (compat is None)
    assert noises[0].dtype == latents[0].dtype == torch.float32
    assert torch.equal(noises[0], noises[0].half().float()) is (compat is not None)


def test_noise_depends_on_the_seed_and_on_nothing_that_ran_before(model: str) -> None:
    """The reference's depends on how many numbers building its networks drew (number 52)."""
    made = []
    for state in (1, 2):
        torch.manual_seed(state)
        torch.rand(state)
        np.random.seed(state)
        made.append(make(model, mode="image", out=f"run{state}")[0].paths["image"].read_bytes())
    assert made[0] == made[1]
    assert made[0] != make(model, mode="image", seed=6, out="other")[0].paths["image"].read_bytes()


def test_resuming_makes_only_what_is_missing(model: str) -> None:
    first = make(model, count=3)
    before = [sample.paths["image"].read_bytes() for sample in first]
    first[1].paths["image"].write_bytes(b"damaged")
    again = make(model, count=3, resume=True)
    assert [sample.index for sample in again] == [1]
    assert [sample.paths["image"].read_bytes() for sample in first] == before
    with pytest.raises(UsageError, match="another steps"):
        make(model, count=3, resume=True, steps=3)


def test_finished_files_are_not_overwritten(model: str) -> None:
    make(model)
    with pytest.raises(UsageError, match="exists"):
        make(model)
    assert len(make(model, force=True)) == 1


class TextFormat:
    """A format of a plugin: a folder `{id}_text`, of masks alone."""

    @staticmethod
    @hookimpl
    def register_formats(register: Register) -> None:
        def names(id: str, settings: GenerateSettings) -> list[str]:
            if settings.mode != "mask":
                raise UsageError("format text holds masks alone", hint="add --mode mask")
            return [f"{id}_text"]

        @writes(names)
        def save(sample: Sample, folder: Path, *, force: bool) -> dict[str, Path]:
            (folder / f"{sample.id}_text").mkdir(parents=True, exist_ok=force)
            (folder / f"{sample.id}_text" / "labels.txt").write_text(str(sample.mask and sample.mask.ids()))
            return {"text": folder / f"{sample.id}_text"}

        register("text", save)


@pytest.fixture
def text_format(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("", extra={"text": TextFormat()})
    for module in ("synthesis", "plugins"):
        monkeypatch.setattr(f"maisi_cli.{module}.plugins", lambda: loaded)


def test_what_a_format_writes_is_known_before_the_work(model: str, text_format: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make(model, mode="mask", format="nifti,text")[0]
    record = json.loads(sample.paths["record"].read_text())
    assert record["outputs"]["text"] == {"file": "s0_text", "sha256": sha256_of(Path("run/s0_text")),
                                         "bytes": Path("run/s0_text/labels.txt").stat().st_size}  # fmt: skip
    assert make(model, mode="mask", format="nifti,text", resume=True) == []
    Path("run/s0_text/labels.txt").write_text("damaged")
    assert [again.id for again in make(model, mode="mask", format="nifti,text", resume=True)] == ["s0"]

    monkeypatch.setattr(synthesis._Run, "start", lambda *_: pytest.fail("work was begun"))
    sample.paths["record"].unlink()
    sample.paths["label"].unlink()
    with pytest.raises(UsageError, match="s0_text already exists"):
        make(model, mode="mask", format="nifti,text")
    for resume in (False, True):
        with pytest.raises(UsageError, match="masks alone"):
            make(model, format="text", out="other", resume=resume)
    assert not Path("other").exists()


def verdicts(monkeypatch: pytest.MonkeyPatch, *passed: bool) -> list[int]:
    """Let the checks answer in turn; the last answer stays."""
    calls: list[int] = []

    def check(image: Any, mask: Any, **_: Any) -> quality.Verdict:
        calls.append(int(np.asarray(image.array, dtype=np.float64).sum()))
        answer = passed[min(len(calls), len(passed)) - 1]
        found = quality.Finding(check="test", label=None, value=0, low=0, high=0, passed=answer, text="the test said no")
        return quality.Verdict(findings=(found,))

    monkeypatch.setattr(synthesis.quality, "check", check)
    return calls


def test_a_failing_sample_is_tried_again_with_another_seed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = verdicts(monkeypatch, False, False, True)
    sample = make(model, on_qc_fail="retry")[0]
    assert len(set(calls)) == 3
    assert sample.record["attempt"] == 2


def test_samples_that_fail_are_dropped_and_the_answer_is_no(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = verdicts(monkeypatch, False)
    with pytest.raises(Rejected, match="1 of 1 samples"):
        make(model, on_qc_fail="retry", retries=2)
    assert len(calls) == 3
    assert not Path("run").exists()


def test_checks_are_told_where_the_mask_is_from_and_where_tiles_meet(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def check(image: Any, mask: Any, **values: Any) -> quality.Verdict:
        told.append(values)
        return quality.Verdict(findings=())

    monkeypatch.setattr(synthesis.quality, "check", check)
    make(model, decoder="window", window="4x4x8", overlap=0.0)
    assert told[0]["tiles"] == ((15,), (15,), ())  # windows of 16 x 16 x 32 voxels in 32 x 32 x 32
    assert not told[0]["own_mask"]
    own_mask(Path("case.nii.gz"))
    make(model, size=None, spacing=None, mask="case.nii.gz", out="own")
    assert told[1]["own_mask"]
    assert told[1]["tiles"] is None


def own_mask(path: Path, size: tuple[int, int, int] = (35, 30, 41)) -> Mask:
    array = np.zeros(size, dtype=np.uint8)
    array[4:-4, 4:-4, 4:-4] = 200
    array[10:20, 10:20, 10:20] = 1
    mask = Mask(array=array, geometry=Geometry(size=size, spacing=(7.0, 7.0, 8.0)))
    write_mask(mask, path)
    return mask


def test_a_mask_of_ones_own_keeps_its_grid(model: str) -> None:
    mask = own_mask(Path("case.nii.gz"))
    sample = make(model, size=None, spacing=None, mask="case.nii.gz", name="{stem}-{index}")[0]
    assert sample.id == "case-0"
    assert sample.image is not None
    assert sample.image.geometry.close_to(mask.geometry)
    stored = nibabel.load(sample.paths["image"])
    given = nibabel.load("case.nii.gz")
    assert stored.shape == given.shape
    assert np.allclose(stored.affine, given.affine, atol=1e-5)
    assert np.array_equal(np.asarray(nibabel.load(sample.paths["label"]).dataobj), np.asarray(given.dataobj))


def test_an_image_for_a_mask_on_a_grid_that_the_model_does_not_take_lies_on_the_masks_own_grid(model: str) -> None:
    mask = own_mask(Path("fine.nii.gz"), (150, 90, 41))  # the model takes at most 64 voxels
    told: list[Any] = []
    values = {"size": None, "spacing": None, "mask": "fine.nii.gz", "allow_ood": True}
    settings = resolve({**SMALL, **values, "model": model})
    (sample,) = synthesis.generate(settings, on_event=told.append)
    assert sample.image is not None
    assert sample.image.geometry.close_to(mask.geometry)
    assert np.array_equal(nibabel.load(sample.paths["image"]).affine, nibabel.load("fine.nii.gz").affine)
    assert np.all(sample.image.array[mask.array == 0] == -1000)
    assert sample.record["mask"]["shown_on"] == {
        "size": [64, 64, 48],
        "spacing_mm": pytest.approx([150 * 7 / 64, 90 * 7 / 64, 41 * 8 / 48]),
    }
    assert sum("is shown to tiny on 64x64x48" in getattr(event, "text", "") for event in told) == 1


def test_a_tumour_painted_into_ones_own_mask_is_another_one_for_every_sample(model: str) -> None:
    mask = own_mask(Path("case.nii.gz"))
    samples = make(model, size=None, spacing=None, mask="case.nii.gz", tumor="liver:30mm", mode="mask", count=2)
    labels = [read_mask(sample.paths["label"]).array for sample in samples]
    for label, sample in zip(labels, samples, strict=True):
        assert set(mask.array[label != mask.array]) == {1}
        assert set(label[label != mask.array]) == {26}
        assert sample.record["mask"]["tumor"]["reached"]
    assert not np.array_equal(*labels)
    again = make(model, size=None, spacing=None, mask="case.nii.gz", tumor="liver:30mm", mode="mask", count=2, shard="2/2", out="again")
    assert np.array_equal(read_mask(again[0].paths["label"]).array, labels[1])


def test_a_sample_that_cannot_be_finished_leaves_no_files(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CannotRun("the disk is full", hint="free some")

    monkeypatch.setattr(synthesis, "preview", fails)
    with pytest.raises(CannotRun, match="the disk is full"):
        make(model, preview=True, keep_latent=True)
    assert {path.name for path in Path("run").rglob("*") if path.is_file()} <= {"labels.json"}  # which is the folder's own


def test_modes(model: str) -> None:
    assert set(make(model, mode="image", out="image")[0].paths) == {"image", "record"}
    alone = make(model, mode="mask", out="mask")[0]
    assert set(alone.paths) == {"label", "record"}
    assert alone.verdict is None


@pytest.mark.parametrize(("name", "message"), [("{oops}", "cannot be filled"), ("a/{index}", "file name"), ("one", "one name")])
def test_bad_names_are_refused(model: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(model, name=name, count=2)


def test_missing_weights_name_the_command() -> None:
    with pytest.raises(CannotRun) as caught:
        synthesis.generate(model="rflow-ct", preset="chest", seed=1)
    assert "models pull rflow-ct" in str(caught.value.hint)


def test_the_command_prints_paths_or_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", model, "--size", "32x32x32", "--spacing", "12x12x12", "--seed", "5", "--on-qc-fail", "keep"]
    assert run([*words, "--out", "a"]) == 0
    text = capsys.readouterr()
    paths = [Path(line) for line in text.out.splitlines()]
    assert len(paths) == 4
    assert all(path.is_file() for path in paths)
    assert run([*words, "--out", "b", "--json", "-q"]) == 0
    text = capsys.readouterr()
    assert text.err == ""
    sample = json.loads(text.out)
    assert sample["schema"] == "maisi.sample/1"
    assert set(sample["seconds"]) == {"mask", "denoise", "decode", "save"}
    assert Path(sample["image"]).read_bytes() == paths[0].read_bytes()
    assert run(["generate", "--config", sample["record"], "--out", "c", "-q"]) == 0
    repeated = Path(capsys.readouterr().out.splitlines()[0])
    assert repeated.read_bytes() == paths[0].read_bytes()


# --- files are written while the next sample is computed --------------------------------------------------------


class Making:
    """A `Make` that notes what happens, in which thread."""

    def __init__(self, fails: int | None = None) -> None:
        self.fails, self.seen = fails, []

    def __call__(self, job: Job) -> Sample | None:
        finish = self.start(job)
        return finish and finish()

    def start(self, job: Job) -> Callable[[], Sample] | None:
        if job.index == self.fails:
            raise UsageError("broken")
        self.seen.append(("compute", job.index, threading.current_thread() is threading.main_thread()))
        if job.index == 1:
            return None  # was not kept

        def finish() -> Sample:
            self.seen.append(("write", job.index, threading.current_thread() is threading.main_thread()))
            return Sample(index=job.index, seed=job.seed, id=job.id, image=None, mask=None, verdict=None)

        return finish


def jobs(count: int) -> list[Job]:
    return [Job(index=k, seed=0, id=f"s{k}") for k in range(count)]


def test_files_are_written_in_another_thread_and_in_order() -> None:
    made = Making()
    samples = list(run_local(jobs(4), made, ignore))
    assert [sample.index for sample in samples] == [0, 2, 3]
    assert all(main is (what == "compute") for what, _, main in made.seen)
    assert [index for what, index, _ in made.seen if what == "write"] == [0, 2, 3]


def test_a_sample_whose_files_are_written_is_not_lost_when_the_next_one_fails() -> None:
    samples = run_local(jobs(3), Making(fails=1), ignore)
    assert next(samples).index == 0
    with pytest.raises(UsageError, match="broken"):
        next(samples)


def test_whoever_stops_early_leaves_whole_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Making()
    for sample in run_local(jobs(4), made, ignore):
        assert sample.index == 0
        break
    assert ("write", 2, False) not in made.seen
