"""`maisi generate` from the command line, with networks of random weights: files, streams, records, resuming, interruption."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import pytest
from maisi_cli import cli, synthesis
from maisi_cli.errors import UsageError
from maisi_cli.record import changed_outputs, sha256_of
from maisi_cli.testing import tiny_model
from maisi_cli.train.data import make_phantoms

from .shell import Done

KINDS = {"paired": ["image", "label", "preview", "record"], "image": ["image", "preview", "record"], "mask": ["label", "preview", "record"]}
PATIENCE_S = 300  # how long a process may take to start where the machine is busy
SAMPLE_KEYS = {"schema", "id", "index", "seed", "model", "image", "label", "record", "preview", "latent", "qc", "seconds", "peak_gib"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def maisi(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs `maisi generate` in an empty folder with the tiny model, whose images no check would pass."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("MAISI_MODEL", str(model))
    monkeypatch.setenv("MAISI_ON_QC_FAIL", "keep")

    def run(line: str) -> Done:
        code = cli.run(["generate", *shlex.split(line)])
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        assert "bug in maisi" not in text.err
        return Done(code, text.out, text.err)

    return run


def content(folder: str | Path, *, without: str = "record.json") -> dict[str, bytes]:
    """Return the files of a folder, but for records, which hold times."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if not path.name.endswith(without)}


VOLUME = "--size 32x32x32 --spacing 12 --seed 5"


@pytest.mark.parametrize("mode", KINDS)
def test_paths_are_on_stdout_and_the_rest_on_stderr(mode: str, maisi: Callable[[str], Done]) -> None:
    done = maisi(f"{VOLUME} --mode {mode} --count 2 --out run --name s{{index}}")
    assert done.code == 0
    assert done.paths == [Path("run") / f"s{k}_{kind}.{end}" for k in range(2) for kind in KINDS[mode] for end in [_end(kind)]]
    names = {Path("run/labels.json")} if mode != "image" else set()  # of the folder, not of a sample
    assert {*done.paths, *names} == set(Path("run").iterdir())
    assert "sample 1: save (run)" in done.err
    assert not set(done.out.splitlines()) & set(done.err.splitlines())


def test_quiet_prints_paths_alone_and_verbose_every_file(maisi: Callable[[str], Done]) -> None:
    line = f"{VOLUME} --mode mask --count 2 --out run"
    quiet, loud = maisi(f"{line} -q"), maisi(f"{line} -v --force")
    assert (quiet.code, quiet.err) == (0, "")
    assert {*quiet.paths, Path("run/labels.json")} == set(Path("run").iterdir())
    assert loud.out == quiet.out
    assert all(f"wrote {path}" in loud.err for path in loud.paths)


def _end(kind: str) -> str:
    return {"image": "nii.gz", "label": "nii.gz", "preview": "png", "record": "json", "latent": "npy"}[kind]


def test_json_is_one_document_for_each_sample_and_agrees_with_its_record(maisi: Callable[[str], Done]) -> None:
    done = maisi(f"{VOLUME} --count 2 --out run --keep-latent --no-preview --json")
    assert done.code == 0
    assert [sample["index"] for sample in done.samples] == [0, 1]
    for sample in done.samples:
        assert set(sample) == SAMPLE_KEYS
        assert (sample["schema"], sample["seed"], sample["model"], sample["preview"]) == ("maisi.sample/1", 5, "tiny", None)
        assert sample["id"] == f"chest-abdomen-tiny-seed5-00{sample['index']}"
        record = json.loads(Path(sample["record"]).read_text())
        assert set(record["outputs"]) == {"image", "label", "latent"}
        for kind, output in record["outputs"].items():
            assert Path(sample[kind]).name == output["file"]
            assert sha256_of(sample[kind]) == output["sha256"]
        assert sample["qc"]["findings"] == record["qc"]["findings"]
        assert sample["seconds"] == record["timing"]["seconds"]
        assert np.load(sample["latent"]).shape == (4, 8, 8, 8)
        image = nibabel.load(sample["image"])
        assert image.shape == (32, 32, 32)
        assert image.header.get_zooms() == (12, 12, 12)
        assert image.header["descrip"].tobytes().startswith(b"SYNTHETIC maisi")


def test_what_was_typed_is_in_the_record_with_its_origin(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    (tmp_path / "maisi.toml").write_text("steps = 4\nretries = 1\n[output]\npreview = false\n")
    sample = maisi("--preset chest --set sampling.steps=3 --seed 5 --mode image --json").samples[0]
    record = json.loads(Path(sample["record"]).read_text())
    found = {key: (entry["value"], entry["origin"]) for key, entry in record["settings"].items()}
    assert found["steps"] == (3, "--set")
    assert found["retries"] == (1, "maisi.toml")
    assert found["preview"] == (False, "maisi.toml")
    assert found["on_qc_fail"] == ("keep", "environment")
    assert found["seed"] == (5, "command line")
    assert found["size"] == ([64, 64, 64], "model tiny")
    assert found["regions"] == (["chest"], "preset chest")
    assert record["environment"]["device"]["name"] == "cpu"


def test_force_replaces_and_without_it_nothing_is_touched(maisi: Callable[[str], Done]) -> None:
    line = f"{VOLUME} --mode mask --out run --name s"
    assert maisi(line).code == 0
    before = content("run", without="none")
    refused = maisi(line)
    assert (refused.code, refused.out) == (2, "")
    assert "run/s_record.json already exists" in refused.err
    assert content("run", without="none") == before
    other = maisi(f"{line} --seed 6 --force")
    assert other.code == 0
    assert content("run")["s_label.nii.gz"] != before["s_label.nii.gz"]


def test_shards_together_are_the_whole_run(maisi: Callable[[str], Done]) -> None:
    line = f"{VOLUME} --count 3 --no-preview"
    assert maisi(f"{line} --out whole").code == 0
    for share in (1, 2):
        assert maisi(f"{line} --out parts --shard {share}/2").code == 0
    assert len(content("whole")) == 7
    assert content("parts") == content("whole")


def test_resuming_finds_the_seed_of_the_run_and_mends_it(maisi: Callable[[str], Done]) -> None:
    line = "--size 32x32x32 --spacing 12 --mode mask --out run --no-preview --resume"
    first = maisi(f"{line} --count 2")
    assert len(first.paths) == 4
    before = content("run", without="none")
    first.paths[0].write_bytes(b"damaged")
    again = maisi(f"{line} --count 3")  # one is damaged, one is complete, one is new
    assert again.code == 0
    assert again.paths[:2] == first.paths[:2]
    assert len(again.paths) == 4
    assert "-001 is complete" in again.err
    assert {name: data for name, data in content("run").items() if name in before} == {
        name: data for name, data in before.items() if not name.endswith("record.json")
    }
    assert len({json.loads(path.read_text())["seed"] for path in Path("run").glob("*_record.json")}) == 1
    assert maisi(f"{line} --count 3").out == ""
    other = maisi(f"{line} --count 3 --preset abdomen --name {{index:03d}}")
    assert other.code == 0  # another name: other samples, of the same seed
    assert maisi(f"{line} --seed 9 --name x").code == 0
    several = maisi(f"{line} --count 3")
    assert (several.code, "holds samples of 2 runs" in several.err, "--seed S" in several.err) == (2, True, True)


def test_resuming_needs_no_weights_when_all_is_there(maisi: Callable[[str], Done], model: Path, tmp_path: Path) -> None:
    assert maisi(f"{VOLUME} --out run").code == 0
    aside = model.with_name("unet.aside")
    model.with_name("unet.safetensors").rename(aside)
    try:
        done = maisi(f"{VOLUME} --out run --resume")
        assert (done.code, done.out, "is complete" in done.err) == (0, "", True)
        assert maisi(f"{VOLUME} --count 2 --out run --resume").code == 3
    finally:
        aside.rename(model.with_name("unet.safetensors"))


@pytest.mark.parametrize(
    "flags", [f"{VOLUME} --count 2", f"{VOLUME} --window 4x4x4 --overlap 0.25 --steps 3", "--size 48x48x32 --mode image"]
)
def test_a_record_repeats_the_run_bit_for_bit(flags: str, maisi: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch) -> None:
    first = maisi(f"{flags} --out a")
    assert first.code == 0
    monkeypatch.delenv("MAISI_MODEL")
    monkeypatch.delenv("MAISI_ON_QC_FAIL")
    again = maisi(f"--config {first.paths[-1]} --out b")
    assert again.code == 0
    assert content("a") == content("b")
    one, other = (json.loads((Path(folder) / first.paths[-1].name).read_text()) for folder in "ab")
    for record in (one, other):
        del record["timing"]
        record["settings"] = {key: entry["value"] for key, entry in record["settings"].items() if key != "out"}
        record["notes"] = []
    assert one == other


def test_flags_change_what_a_record_repeats(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    record = maisi("--preset chest --seed 5 --mode mask --steps 7 --out a").paths[-1]

    def settings(flags: str) -> dict[str, Any]:
        return {
            key: entry["value"] for key, entry in json.loads(maisi(f"--config {record} --dry-run --json {flags}").out)["settings"].items()
        }

    same = settings("")
    assert (same["preset"], same["regions"], same["seed"], same["steps"], same["out"]) == ("chest", ["chest"], 5, 7, ".")
    assert settings("--steps 9")["steps"] == 9
    small = settings("--size 32x32x32")
    assert (small["size"], small["regions"]) == ([32, 32, 32], ["chest"])
    other = settings("--preset abdomen")
    assert (other["preset"], other["regions"], other["seed"], other["steps"]) == ("abdomen", ["abdomen"], 5, 7)
    assert other["fov"] != same["fov"]


def test_the_window_decoder_is_used_when_a_window_is_asked_for(maisi: Callable[[str], Done]) -> None:
    exact = maisi(f"{VOLUME} --out exact --mode image --dtype fp32")
    window = maisi(f"{VOLUME} --out window --mode image --dtype fp32 --window 4x4x4")
    assert "sample 0: decode (window)" in window.err
    one, other = (np.asarray(nibabel.load(done.paths[0]).dataobj) for done in (exact, window))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)  # every window has group norms of its own
    whole = maisi(f"{VOLUME} --out whole --mode image --dtype fp32 --window 64x64x64")
    assert np.abs(np.asarray(nibabel.load(whole.paths[0]).dataobj).astype(int) - one).max() <= 1


def test_a_mask_that_is_moved_is_followed(maisi: Callable[[str], Done]) -> None:
    array = np.zeros((30, 29, 31), np.uint8)
    array[4:-4, 4:-4, 4:-4] = 200
    array[8:16, 8:16, 8:16] = 1
    affine = np.array([[-12.0, 0, 0, 100], [0, 0, 13, -50], [0, 12, 0, 30], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(array, affine), "moved.nii.gz")
    done = maisi("--mask moved.nii.gz --seed 1 --out run")
    assert done.paths[0] == Path("run/moved-tiny-seed1-000_image.nii.gz")
    for path in done.paths[:2]:
        stored = nibabel.load(path)
        assert stored.shape == array.shape
        np.testing.assert_allclose(stored.affine, affine, atol=1e-4)
        np.testing.assert_allclose(stored.get_qform(), affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(nibabel.load(done.paths[1]).dataobj), array)
    image = np.asarray(nibabel.load(done.paths[0]).dataobj)
    assert (image[array == 0] == -1000).all()
    again = maisi(f"--mask {done.paths[1]} --seed 1 --out again --name moved-tiny-seed1-000")
    np.testing.assert_array_equal(np.asarray(nibabel.load(again.paths[0]).dataobj), image)


def test_the_label_of_a_run_goes_back_in_unchanged(maisi: Callable[[str], Done]) -> None:
    first = maisi(f"{VOLUME} --format nifti,nifti --no-preview --out run")  # named twice, written once
    assert first.code == 0
    label = first.paths[1]
    assert label.name.endswith("_label.nii.gz")
    again = maisi(f"--mask {label} --seed 5 --no-preview --out again")
    assert again.code == 0
    assert again.paths[1].read_bytes() == label.read_bytes()
    assert again.paths[0].read_bytes() == first.paths[0].read_bytes()  # the mask is all that the image is made of, but for the seed
    ids = set(np.unique(np.asarray(nibabel.load(label).dataobj)).tolist())
    assert {0, 1, 200} <= ids  # the full vocabulary: liver is 1, body is kept
    assert not ids & set(range(133, 200))


def test_samples_that_fail_the_check_are_not_written(maisi: Callable[[str], Done]) -> None:
    for policy, tries in (("drop", 1), ("retry --retries 1", 2)):
        done = maisi(f"{VOLUME} --on-qc-fail {policy} --keep-latent --out run --json")
        assert (done.code, done.out) == (1, "")
        assert done.err.count("failed the check") == tries
        assert "1 of 1 samples failed the quality check" in done.err
        assert not list(Path("run").iterdir())


def test_masks_need_no_gpu_and_the_record_says_so(maisi: Callable[[str], Done]) -> None:
    done = maisi(f"{VOLUME} --mode mask --gpu 24g --out run")
    assert done.code == 0
    assert "uses the processor, not the GPU" in done.err
    assert json.loads(done.paths[-1].read_text())["environment"]["device"]["name"] == "cpu"


def test_dry_run_makes_nothing_and_names_every_origin(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    text, data = maisi(f"{VOLUME} --dry-run --out run"), maisi(f"{VOLUME} --dry-run --out run --json")
    assert (text.code, data.code) == (0, 0)
    assert not list(tmp_path.iterdir())
    (document,) = data.samples
    assert (document["schema"], document["problem"]) == ("maisi.dry-run/1", None)
    assert document["settings"]["seed"] == {"value": 5, "origin": "command line", "hides": []}
    assert document["settings"]["model"]["origin"] == "environment"
    assert "volume 32x32x32 voxels of 12x12x12 mm, field of view 384x384x384 mm" in text.out
    missing = maisi("--model rflow-ct --dry-run --json")
    assert missing.code == 3
    assert "maisi models pull rflow-ct" in missing.samples[0]["problem"]
    assert missing.samples[0]["plan"]["model"] == "rflow-ct"


# --- interruption ---------------------------------------------------------------------------


def test_nothing_half_written_is_left_when_writing_is_interrupted(maisi: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def part(self: nibabel.Nifti1Image, file: IO[bytes]) -> None:
        written.append(file.write(b"begun"))
        raise KeyboardInterrupt

    monkeypatch.setattr(nibabel.Nifti1Image, "to_stream", part)
    done = maisi(f"{VOLUME} --mode mask --out run")
    assert (done.code, done.out, written) == (130, "", [5])
    assert done.err.splitlines()[-1].startswith("error: interrupted")
    assert not list(Path("run").iterdir())


def test_a_damaged_disk_is_not_a_bug(maisi: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: nibabel.Nifti1Image, file: IO[bytes]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel.Nifti1Image, "to_stream", full)
    done = maisi(f"{VOLUME} --mode mask --out run")
    assert (done.code, done.out) == (3, "")
    assert "No space left on device" in done.err
    assert not list(Path("run").iterdir())


def _start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MAISI_HOME": str(folder / "home"), "MAISI_CONFIG": str(folder / "config.toml"), "OMP_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would its child
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "maisi_cli", *words], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(words: list[str], folder: Path, after: Path) -> Done:
    """Run a command and send it Ctrl-C as soon as the file `after` is there."""
    with _start(words, folder) as process:
        until = time.monotonic() + PATIENCE_S
        while not after.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Done(process.returncode, out, err)


def test_ctrl_c_ends_generate_with_130_and_whole_files(model: Path, tmp_path: Path) -> None:
    words = shlex.split(
        f"generate --model {model} {VOLUME} --count 99 --steps 20 --on-qc-fail keep --no-preview --out run --name s{{index}}"
    )
    done = _interrupted(words, tmp_path, tmp_path / "run" / "s0_record.json")
    assert done.code == 130
    assert "error: interrupted" in done.err
    assert "Traceback" not in done.err
    told = [tmp_path / line for line in done.out.splitlines()]
    assert len(told) < 99 * 3
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    for path in (tmp_path / "run").glob("*.nii.gz"):
        assert np.asarray(nibabel.load(path).dataobj).shape == (32, 32, 32)
    for path in (tmp_path / "run").glob("*_record.json"):
        assert not changed_outputs(json.loads(path.read_text()), tmp_path / "run")


def test_ctrl_c_ends_training_with_130_and_it_goes_on(model: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "data", 2, size=32, workers=1)
    settings = f"--set model={model} --set crops=[[16,16,16]] --set whole_share=0.0 --set precision=no"
    words = shlex.split(f"train vae --data data --out run --resume auto {settings}")
    done = _interrupted([*words, "--set", "steps=100000"], tmp_path, tmp_path / "run" / "log.jsonl")
    assert (done.code, done.out) == (130, "")
    assert "continue with --resume auto" in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "log.jsonl", "vae.safetensors"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert cli.run([*words, "--set", f"steps={last + 1}", "-q"]) == 0
    finally:
        os.chdir(before)


def test_a_closed_pipe_ends_the_run_with_whole_files(model: Path, tmp_path: Path) -> None:
    words = shlex.split(f"generate --model {model} {VOLUME} --mode mask --count 40 --no-preview --out run")
    with _start([*words, "-q"], tmp_path) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141
    made = sorted((tmp_path / "run").iterdir())
    assert tmp_path / first in made
    assert not [path for path in made if path.name.startswith(".")]
    assert len(made) < 81


def test_python_and_the_command_agree(maisi: Callable[[str], Done], model: Path) -> None:
    done = maisi(f"{VOLUME} --out command")
    values = {"model": str(model), "size": (32, 32, 32), "spacing": (12, 12, 12), "seed": 5, "on_qc_fail": "keep"}
    (sample,) = synthesis.generate(out="python", **values)
    assert [path.name for path in sample.paths.values()] == [path.name for path in done.paths]
    assert content("python") == content("command")
    with pytest.raises(UsageError, match="setting named 'spcing'"):
        synthesis.generate(out="other", spcing=3, **values)
    assert not Path("other").exists()
