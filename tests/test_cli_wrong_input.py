"""Wrong use and wrong input: exit code, one line that says what is wrong, one that says what to do, and nothing written."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from maisi_cli import cli, devices, presets
from maisi_cli.testing import TINY, tiny_model

BODY = 200
SPACING = 12.0
TINY_VOLUME = "generate --model tiny.toml --size 32x32x32 --spacing 12 --seed 1 --out new"
TINY_MASK = "generate --model tiny.toml --seed 1 --out new --mask"


def label_map() -> np.ndarray:
    """Return a body of 24^3 voxels with a liver in it."""
    array = np.zeros((32, 32, 32), np.uint8)
    array[4:28, 4:28, 4:28] = BODY
    array[10:20, 10:20, 10:20] = 1
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([SPACING, SPACING, SPACING, 1]) if affine is None else affine), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and with files that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(folder)
    body = label_map()
    wide = body.astype(np.int16)
    save(folder / "body.nii.gz", body)
    save(folder / "no_body.nii.gz", np.where(body == BODY, 0, body).astype(np.uint8))
    save(folder / "renumbered.nii.gz", np.where(body == BODY, 2, body).astype(np.uint8))
    save(folder / "unknown_id.nii.gz", np.where(body == 1, 140, body).astype(np.uint8))
    save(folder / "over_255.nii.gz", np.where(body == 1, 300, wide).astype(np.int16))
    save(folder / "negative.nii.gz", np.where(body == 1, -1, wide).astype(np.int16))
    save(folder / "fractions.nii.gz", (body * 0.5 + 0.25).astype(np.float32))
    save(folder / "nan.nii.gz", np.where(body == 1, np.nan, body).astype(np.float32))
    save(folder / "four.nii.gz", np.repeat(body[..., None], 2, axis=3))
    save(folder / "flat.nii.gz", body[:, :, 10])
    save(folder / "empty.nii.gz", np.zeros_like(body))
    save(folder / "small.nii.gz", body, np.diag([3.0, 3.0, 3.0, 1.0]))
    save(folder / "large.nii.gz", np.zeros((200, 8, 8), np.uint8) + np.uint8(BODY))
    sheared = np.diag([SPACING, SPACING, SPACING, 1])
    sheared[0, 1] = SPACING / 2
    save(folder / "sheared.nii.gz", body, sheared)
    (folder / "text.nii.gz").write_text("not an image")
    (folder / "cut.nii.gz").write_bytes((folder / "body.nii.gz").read_bytes()[:200])
    (folder / "body.mha").write_text("ObjectType = Image")
    (folder / "notes.txt").write_text("notes")
    (folder / "misspelt.toml").write_text(TINY.replace("size_max", "siz_max"))
    (folder / "no_vae.toml").write_text(TINY.replace("[networks.vae]", "[networks.vea]"))
    (folder / "argument.toml").write_text(TINY.replace("num_res_blocks = 1\n", "num_res_block = 1\n"))
    (folder / "unweighted.toml").write_text(TINY.replace("unet.safetensors", "elsewhere.safetensors"))
    (folder / "scheduler.toml").write_text(TINY.replace('name = "rflow"', 'name = "rflw"'))
    (folder / "region.toml").write_text('schema = "maisi.preset/1"\nkind = "region"\nextends = "chest"\n[volume]\nsiz = [1, 2, 3]\n')
    (folder / "record.json").write_text('{"schema": "maisi.record/1", "settings": {"steps": 3}, "model": {}, "seed": 1, "outputs": {}}')
    (folder / "list.json").write_text('{"training": [{"image": "absent.nii.gz", "spacing": [1, 1, 1]}]}')
    (folder / "bare").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "s_record.json").write_text("{}")
    (folder / "full" / "alone_label.nii.gz").write_bytes((folder / "body.nii.gz").read_bytes())
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the folder, away from the user's own settings; fail when a test changes it."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    presets.read.cache_clear()
    before = tree(place)
    yield place
    assert tree(place) == before
    assert not (tmp_path / "home").exists()


def tree(folder: Path) -> dict[str, str | None]:
    """Return the sha256 of every file below a folder, None of a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}  # fmt: skip


def refused(line: str, code: int, says: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a line; check that it fails with this code and says this in one line of what and one line of what to do."""
    assert cli.run(shlex.split(line)) == code
    text = capsys.readouterr()
    assert text.out == ""
    assert "Traceback" not in text.err
    lines = text.err.splitlines()
    assert [each.startswith("error: ") for each in lines] == [False] * (len(lines) - 2) + [True, False], text.err
    assert says.casefold() in lines[-2].casefold()
    assert lines[-1].startswith("  ")
    assert hint.casefold() in lines[-1].casefold()


NAMES = [
    ("nonsense", "no such command 'nonsense'", "maisi --help"),
    ("generte", "did you mean 'generate'", "maisi --help"),
    ("fid real/ synth/", "there is no file or folder real", "check the path"),
    ("generate --prset chest", "no such option: --prset", "did you mean --preset"),
    ("generate --tumor brain:15mm", "no tumour of 'brain' can be made", "lung, pancreas, liver, colon or bone"),
    ("generate --anatomy-size liver=0.5", "phantom cannot honour --anatomy-size", "--mask-source diffusion"),
    ("generate --cfg-tumor 2", "--cfg-tumor needs masks with a tumour", "--tumor liver:15mm"),
    ("generate --mask-steps 10", "phantom cannot honour --mask-steps", "--mask-source diffusion"),
    ("generate --manifest missing.csv", "the manifest missing.csv cannot be read", "a column id"),
    ("generate --splits 2", "no such option: --splits", "maisi generate --help"),
    ("generate --offload", "no such option: --offload", "maisi generate --help"),
    ("generate chest", "unexpected extra argument", "maisi generate --help"),
    ("generate --preset", "requires an argument", "--help"),
    ("generate --preset chset", "no region preset named 'chset'", "did you mean 'chest'"),
    ("generate --preset 24g", "no region preset named '24g'", "maisi presets list --kind region"),
    ("generate --preset missing.toml", "there is no preset file missing.toml", "maisi presets list"),
    ("generate --preset region.toml", "unknown key volume.siz, did you mean volume.size", "maisi presets validate"),
    ("generate --gpu 23g", "no gpu preset named '23g'", "'24g'"),
    ("generate --model rflowct", "no model named 'rflowct'", "'rflow-ct'"),
    ("generate --model missing.toml", "there is no model file missing.toml", "maisi models list"),
    ("generate --model misspelt.toml", "unknown key limits.siz_max", "'size_max'"),
    ("generate --model no_vae.toml", "unknown key networks.vea", "'vae'"),
    ("generate --model scheduler.toml --size 32 --spacing 12", "no scheduler named 'rflw'", "'rflow'"),
    ("generate --anatomy livr", "no label named 'livr'", "'liver'"),
    ("generate --scheduler rflw", "no scheduler named 'rflw'", "'rflow'"),
    ("generate --executor ray", "no executor named 'ray'", "maisi plugins list"),
    ("generate --format mhd", "no format named 'mhd'", "maisi plugins list"),
    ("generate --format nifti,mhd", "no format named 'mhd'", "maisi plugins list"),
    ("generate --mask-source database", "nano-ct comes without a mask database", "--mask-database INDEX.json"),
    ("generate --mask-source diffusion", "nano-ct has no mask networks", "--model rflow-ct"),
    ("generate --labels total", "no label set named 'total'", "'totalsegmentator'"),
    (f"{TINY_MASK} body.nii.gz --labels total", "no label set named 'total'", "'totalsegmentator'"),
    (f"{TINY_MASK} body.nii.gz --labels table.toml", "remap table table.toml does not exist", "maisi labels"),
    ("data chek list.json", "no such command 'chek'", "maisi data --help"),
    ("train vea --data list.json --out new", "did you mean 'vae'", "maisi train --help"),
    ("train mask-vae --data none.json --out new", "no data list none.json", "maisi data phantom"),
    ("train mask-dm --data list.json --out new", "needs the mask autoencoder's weights", "--vae FILE"),
    ("data check missing", "no data list missing", "maisi data phantom"),
    ("data check list.json --model rflw", "no model named 'rflw'", "'rflow-ct'"),
    ("data import-latents list.json --out new", "training[0] has no embedding absent_emb.nii.gz", "--base"),
    ("data import-latents list.json --out new --vae missing.safetensors", "--vae missing.safetensors is not a file", ".safetensors"),
    ("data encode list.json --model tiny.toml --out new --size 30x32x32", "does not divide by 4", "32x32x32"),
    ("data encode list.json --model tiny.toml --out new --size big", "'big' is not three numbers", "512x512x128"),
    ("data encode list.json --model tiny.toml --out new --latent mode", "--latent 'mode' is not known", "mean or sample"),
    ("train vae --data list.json --out new --gpus 0", "--gpus 0 is no number of GPUs", "auto"),
    ("models pull rflow-tc", "no model named 'rflow-tc'", "'rflow-ct'"),
    ("models pull tiny.toml", "lists no file of a hub", "beside tiny.toml"),
    ("models remove nano-ct", "came with maisi and are not removed", "yourself"),
    ("models remove tiny.toml", "are your own and are not removed", "yourself"),
    ("models export tiny.toml", "has no files from the hub", "copy its folder"),
    ("models import notes.txt --accept-license", "notes.txt is not a whole bundle", "maisi models export"),
    ("models import missing.tar --accept-license", "there is no bundle missing.tar", "maisi models export"),
    ("plugins new mine", "no such command 'new'", "maisi plugins --help"),
    ("report absent", "the folder absent does not exist", "maisi generate"),
    ("report notes.txt", "the folder notes.txt is a file", "maisi generate"),
    ("report full", "s_record.json has no schema, not 'maisi.record/1'", "*_record.json"),
    ("report full --volumes -1", "--volumes is a number of samples from 0, not -1", "12"),
    ("report", "missing argument 'RUN_DIR'", "maisi report --help"),
    ("labels add-body body.nii.gz new.nii.gz --ct body.nii.gz --hu -500", "no such option: --hu", "maisi labels add-body --help"),
]
"""Misspelt names, and what the contract names but is not there yet."""

VALUES = [
    ("generate --mode pair", "--mode 'pair'", "'paired'"),
    ("generate --modality ctt", "no modality named 'ctt'", "'ct'"),
    ("generate --modality 9", "no modality named '9'", "maisi labels list --modalities"),
    ("generate --model rflow-ct --modality unknown", "not trained on unknown", "no model knows it"),
    ("generate --model rflow-mr --mode image --modality mri-t1-skull-stripped", "not trained on mri-t1-skull", "--model rflow-mr-brain"),
    ("generate --modality mri-t1", "not trained on mri-t1", "--model rflow-mr"),
    (f"{TINY_MASK} body.nii.gz --modality mri-t1", "not trained on mri-t1", "--model rflow-mr"),
    ("generate --model rflow-ct --preset brain-t1-axial", "not trained on mri-t1", "--model rflow-mr"),
    ("generate --preset brain-t1-axial", "makes image only", "--mode image"),
    ("generate --steps 0", "--steps 0", "1..1000"),
    ("generate --steps many", "'--steps'", "maisi generate --help"),
    ("generate --count 0", "--count 0", "at least 1"),
    ("generate --seed -1", "--seed -1", "0..9223372036854775807"),
    ("generate --retries -1", "--retries -1", "0..100"),
    ("generate --on-qc-fail maybe", "--on-qc-fail 'maybe'", "retry, drop, keep"),
    ("generate --compat refrence", "--compat 'refrence'", "'reference'"),
    ("generate --cfg-modality nan", "--cfg-modality nan", "at least 0"),
    ("generate --format ,", "--format ','", "nifti"),
    ("generate --shard 4/3 --seed 1", "--shard '4/3'", "--shard 3/16"),
    ("generate --shard 0/3 --seed 1", "--shard '0/3'", "--shard 3/16"),
    ("generate --shard 1/0 --seed 1", "--shard '1/0'", "--shard 3/16"),
    ("generate --shard -1/3 --seed 1", "--shard '-1/3'", "--shard 3/16"),
    ("generate --shard 1/3/5 --seed 1", "--shard '1/3/5'", "--shard 3/16"),
    ("generate --shard 3 --seed 1", "--shard '3'", "--shard 3/16"),
    ("generate --shard 1/3", "--shard needs the seed", "--seed S"),
    ("generate --device gpu", "--device 'gpu'", "auto, cpu, cuda, cuda:1 or mps"),
    ("generate --device meta", "--device 'meta'", "auto, cpu, cuda, cuda:1 or mps"),
    ("generate --dtype fp8", "--dtype 'fp8'", "auto, fp32, bf16, fp16"),
    ("generate --decoder exat", "--decoder 'exat'", "'exact'"),
    ("generate --decoder window", "needs a window", "--window 64x64x48"),
    ("generate --overlap 0.3", "needs a window", "--window 64x64x48"),
    ("generate --decoder exact --window 8x8x8", "--window is of the window decoder", "--decoder window"),
    ("generate --window 8x8", "window '8x8'", "64x64x48"),
    ("generate --overlap 1", "--overlap 1", "0..1, without 1"),
    ("generate --labels totalsegmentator", "--labels speaks of the label map of --mask", "add --mask FILE"),
    ("generate --allow-missing-body", "--allow-missing-body speaks of the label map", "add --mask FILE"),
    ("generate --mask-source file", "--mask-source file needs a mask", "add --mask FILE"),
    ("generate --mask body.nii.gz --mask-source phantom", "exclude each other", "leave one out"),
    ("generate --mask body.nii.gz --mode image", "--mode image", "leave --mask out"),
    ("generate --mask body.nii.gz --size 32x32x32", "--size and --mask exclude each other", "leave --size out"),
    ("generate --mode image --mask-source phantom", "--mode image makes an image without a mask", "leave --mask-source out"),
    ("generate --mode mask --keep-latent", "--mode mask makes no latent", "leave --keep-latent out"),
    ("generate --on-qc-fail keep --retries 5", "--retries 5 would go unused", "leave --retries out"),
    (f"{TINY_VOLUME} --scheduler ddpm --dry-run", "trained for the scheduler rflow", "--scheduler rflow"),
    ("generate --model ddpm-ct --scheduler rflow --dry-run", "trained for the scheduler ddpm", "--scheduler ddpm"),
    (f"{TINY_VOLUME} --scheduler ddpm", "trained for the scheduler rflow", "--scheduler rflow"),
    (f"{TINY_VOLUME} --scheduler ab2 --compat reference --dry-run", "the reference has no scheduler ab2", "--scheduler rflow"),
    (f"{TINY_VOLUME} --scheduler ab2 --compat reference", "the reference has no scheduler ab2", "--scheduler rflow"),
    ("generate --mode image --anatomy liver", "--mode image makes no mask", "leave --anatomy out"),
    (f"{TINY_VOLUME} --name a/b", "makes the file name 'a/b'", "slashes"),
    (f"{TINY_VOLUME} --name .hidden", "makes the file name '.hidden'", "leading dots"),
    (f"{TINY_VOLUME} --name {{oops}}", "there is no {oops}", "{index}"),
    (f"{TINY_VOLUME} --name {{index", "cannot be filled in", "{index}"),
    (f"{TINY_VOLUME} --name {{index.real}}", "there is no {index.real}", "{index}"),
    (f"{TINY_VOLUME} --name one --count 2", "gives all 2 samples one name", "put {index}"),
    (f"{TINY_VOLUME} --name {{{{index}}}} --count 2", "gives all 2 samples one name", "put {index}"),
    (f"{TINY_VOLUME} --name {'x' * 300}", "300 bytes", "below 200"),
    (f"{TINY_VOLUME} --out notes.txt", "notes.txt is a file", "another --out"),
    (f"{TINY_VOLUME} --out notes.txt/deeper", "notes.txt is a file", "another --out"),
    (f"{TINY_VOLUME} --out full --name s", "already exists", "--force"),
    (f"{TINY_VOLUME} --out full --name alone", "alone_label.nii.gz already exists", "--force"),
    (f"{TINY_VOLUME} --out full --name s --resume", "s_record.json", "maisi wrote"),
    (f"{TINY_VOLUME} --model argument.toml", "num_res_block", "model file"),
    ("generate --config missing.json", "missing.json does not exist", "*_record.json"),
    ("generate --config tiny.toml", "is not JSON", "*_record.json"),
    ("generate --config record.json", "its settings are of another form", "*_record.json"),
    ("generate --set steps", "--set 'steps' has no value", "--set steps=20"),
    ("generate --set stps=3", "no setting named 'stps' (from --set)", "'steps'"),
    ("generate --set steps=few", "--steps 'few' (--set)", "whole number"),
    ("generate --set steps=2.5", "--steps 2.5 (--set)", "whole number"),
    ("generate --set steps=true", "--steps True (--set)", "whole number"),
    ("generate --set format=3", "--format 3 (--set)", "names joined by commas"),
    ("generate --set anatomy=[1]", "--anatomy [1] (--set)", "names joined by commas"),
    ("generate --set out=[1]", "--out [1] (--set)", "must be text"),
    ("generate --set overlap=half", "--overlap 'half' (--set)", "must be a number"),
    ("generate --set volum.size=1x1x1", "no table 'volum'", "volume"),
    ("generate --set volume.size=[1,2]", "size [1, 2]", "512x512x128"),
    ("qc missing", "no file or folder missing", "path"),
    ("qc bare", "bare holds no NIfTI file", "the files themselves"),
    ("qc body.nii.gz --label-dir missing", "no folder missing", "--label-dir"),
    ("qc body.nii.gz --checks hu-medain", "'hu-medain'", "'hu-median'"),
    ("qc body.nii.gz --labels totalsegmentatr", "'totalsegmentatr'", "'totalsegmentator'"),
    ("qc body.nii.gz --reference full", "--reference belongs to the search for copies", "--memorization"),
    ("qc body.nii.gz --threshold 3", "--threshold belongs to the search for copies", "--memorization"),
    ("qc body.nii.gz --memorization", "--memorization needs real cases", "--reference DIR"),
    ("qc body.nii.gz --memorization --reference full", "the reference holds 1 cases", "more cases"),
    ("qc body.nii.gz --memorization --reference full --spaces colour", "no space 'colour'", "mask, latent, intensity"),
    ("qc body.nii.gz --csv notes.txt", "notes.txt already exists", "--force"),
    ("qc body.nii.gz --html notes.txt", "notes.txt already exists", "--force"),
    ("qc body.nii.gz --modality ctt", "no modality named 'ctt'", "'ct'"),
    ("qc body.nii.gz --anatomy livr", "no label named 'livr'", "'liver'"),
    ("qc body.nii.gz --compat x", "--compat 'x'", "--compat reference"),
    ("qc text.nii.gz", "text.nii.gz is not a NIfTI file", "NIfTI"),
    ("data phantom --count 0 --out new", "'--count'", "maisi data phantom --help"),
    ("data phantom --size 31 --out new", "'--size'", "maisi data phantom --help"),
    ("data phantom --out notes.txt", "notes.txt is a file", "another --out"),
    ("data phantom --out .", "list.json already exists", "--force"),
    ("data encode missing --model tiny.toml --out new", "no data list missing", "maisi data phantom"),
    ("data encode list.json --model tiny.toml --out new", "absent.nii.gz, which does not exist", "list"),
    ("data encode list.json --vae missing.safetensors --out new", "--vae missing.safetensors is not a file", ".safetensors"),
    ("data encode list.json --model rflw --out new", "no model named 'rflw'", "'rflow-ct'"),
    ("train vae --out new", "missing option '--data'", "maisi train vae --help"),
    ("train vae --data missing --out new", "no data list missing", "maisi data phantom"),
    ("train vae --data notes.txt --out new", "notes.txt is not a data list", "training"),
    ("train vae --data list.json --out new --preset nano-va", "no train preset named 'nano-va'", "'nano-vae'"),
    ("train vae --data list.json --out new --preset nano-dm", "trains dm, not vae", "maisi train dm"),
    ("train vae --data list.json --out new --set train.step=2", "no training setting named 'step'", "'steps'"),
    ("train vae --data list.json --out new --set network.steps=2", "no table 'network'", "tables are train"),
    ("train vae --data list.json --out new --set steps=few", "train.steps 'few' (--set)", "whole number"),
    ("train vae --data list.json --out new --set train.lr=fast", "train.lr 'fast' (--set)", "a number"),
    ("train vae --data list.json --out new --set max_minutes=true", "train.max_minutes True (--set)", "a number"),
    ("train vae --data list.json --out new --set crops=64", "train.crops 64 (--set)", "a list"),
    ("train vae --data list.json --out new --set device=1", "train.device 1 (--set)", "text"),
    ("train vae --data list.json --out new --set steps=0", "train.steps is 0", "larger than 0"),
    ("train vae --data list.json --out new --init missing.safetensors", "--init missing.safetensors is not a file", ".safetensors"),
    ("train vae --data list.json --out notes.txt", "notes.txt is a file", "another --out"),
    ("train controlnet --data list.json --out new --unet missing", "--unet missing is not a file", ".safetensors"),
]
"""Values that are wrong, contradict one another, or would go unused."""

VOLUMES = [
    ("--model nano-ct --size 64x64x64 --spacing 2x2x2", "field of view 128 mm across is below the 192 mm", "--spacing 4x4x2 or larger"),
    ("--model nano-ct --size 64x64x64 --fov 200x200x200", "below the 256 mm of body scans", "--allow-ood"),
    ("--model rflow-ct --size 512x512x128 --spacing 0.5x0.5x1", "field of view 256 mm", "--allow-ood"),
    ("--model rflow-ct --size 512x512x128 --spacing 0.3x0.3x1", "spacing 0.3 mm along x", "maisi recommend-spacing"),
    ("--model rflow-ct --size 512x512x128 --spacing 0.8x0.9x1", "spacing x 0.8 and y 0.9 mm differ", "maisi recommend-spacing"),
    ("--model rflow-ct --size 500x500x128 --spacing 0.8", "cannot make 500x500x128", "512x512x128 (spacing 0.7812x0.7812x0.8 mm)"),
    ("--model rflow-mr --mode image --preset prostate-t2 --size 300x300x100", "cannot make 300x300x100", "256x256x128"),
    ("--model rflow-mr --mode image --preset prostate-t2 --spacing 0.3", "spacing 0.3 mm along x is outside 0.4..5", "recommend-spacing"),
    ("--model tiny.toml --size 30x32x33 --spacing 12", "cannot make 30x32x33", "32x32x32 (spacing 11.25x12x12.38 mm) or 32x32x48"),
    ("--model tiny.toml --size 128 --spacing 12", "cannot make 128x128x128", "64x64x64"),
    ("--model tiny.toml --size 32x32x32 --spacing 50", "spacing 50 mm along x is outside 1..30 mm", "maisi recommend-spacing"),
    ("--model tiny.toml --size 32 --spacing 12 --fov 400x400x400", "is 384x384x384 mm, not the fov 400x400x400", "two of the three"),
    ("--model tiny.toml --size 0x32x32 --spacing 12", "positive", "512x512x128"),
    ("--model tiny.toml --size 32x32 --spacing 12", "three numbers joined by x", "512x512x128"),
    ("--model tiny.toml --size 32.5x32x32 --spacing 12", "not in whole voxels", "512x512x128"),
    ("--model tiny.toml --size 32 --spacing -1", "spacing '-1'", "1.5x1.5x2"),
    ("--model tiny.toml --size 32 --spacing nan", "spacing 'nan'", "1.5x1.5x2"),
    ("--model tiny.toml --size 32 --fov 384mm", "fov '384mm'", "1.5x1.5x2"),
]

MASKS = [
    ("no_body", "no body envelope (label 200)", "maisi labels add-body no_body.nii.gz NEW.nii.gz --ct CT.nii.gz"),
    ("renumbered", "no body envelope (label 200)", "--allow-missing-body"),
    ("unknown_id", "ids that MAISI does not have: 140", "--labels totalsegmentator"),
    ("over_255", "label 300; labels lie in 0..255", "133..199 or 201..255"),
    ("negative", "negative label -1", "0"),
    ("fractions", "not whole", "uint8"),
    ("nan", "not whole", "uint8"),
    ("four", "4 axes (32x32x32x2)", "one 3D volume"),
    ("flat", "2 axes", "one 3D volume"),
    ("empty", "holds no label at all", "maisi info"),
    ("empty --allow-missing-body", "holds no label at all", "maisi info"),
    ("large", "no grid that covers 200x8x8", "crop the mask"),
    ("small --model nano-ct", "field of view 96 mm across is below the 192 mm", "a mask of 256 mm across or more, or --allow-ood"),
    ("sheared", "sheared affine", "resample"),
    ("text", "not a NIfTI file", "convert it to NIfTI"),
    ("cut", "damaged", "copy or convert"),
    ("missing", "missing.nii.gz does not exist", ".nii.gz"),
]


@pytest.mark.parametrize(("line", "says", "hint"), NAMES + VALUES)
def test_wrong_use(line: str, says: str, hint: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(line, 2, says, hint, capsys)


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize(("flags", "says", "hint"), VOLUMES)
def test_wrong_volumes(flags: str, says: str, hint: str, dry: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(f"generate {flags} --out new{dry}", 2, says, hint, capsys)


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize(("name", "says", "hint"), MASKS)
def test_wrong_masks(name: str, says: str, hint: str, dry: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _, flags = name.partition(" ")
    refused(f"{TINY_MASK} {file}.nii.gz {flags}{dry}", 2, says, hint, capsys)


@pytest.mark.parametrize("dry", ["", " --dry-run"])
def test_masks_that_do_not_hold_what_is_asked_for(dry: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(f"{TINY_MASK} body.nii.gz --anatomy liver,spleen{dry}", 2, "body.nii.gz has no spleen", "leave it out of --anatomy", capsys)
    refused(f"{TINY_MASK} body.mha{dry}", 2, "not named .nii.gz", "convert it to NIfTI", capsys)


@pytest.mark.parametrize(("name", "says"), [("brain", "no brain in this volume"), ("hepatic tumor", "the phantom has no hepatic tumor")])
def test_organs_that_the_phantom_cannot_show(name: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(f"{TINY_VOLUME} --anatomy '{name}'", 2, says, "", capsys)


CANNOT = [
    ("generate --model rflow-ct --preset chest-abdomen --out new", "model rflow-ct is not installed", "maisi models pull rflow-ct"),
    ("generate --preset brain-t1-axial --mode image --out new", "rflow-mr-brain is not installed", "maisi models pull rflow-mr-brain"),
    ("generate --model unweighted.toml --size 32 --spacing 12 --out new", "elsewhere.safetensors is missing", "[[weights]] of unweighted"),
    ("models pull rflow-ct", "NVIDIA Open Model License", "maisi models pull rflow-ct --accept-license"),
    ("models pull rflow-mr --accept-license --commercial", "does not allow commercial use", "use ddpm-ct, nano-ct, nano-mask, rflow-ct"),
    ("models pull rflow-ct --accept-license --offline", "nothing is fetched offline", "maisi models import"),
    ("models verify rflow-ct", "model rflow-ct is not installed", "maisi models pull rflow-ct"),
    ("models export rflow-ct", "model rflow-ct is not installed", "maisi models pull rflow-ct"),
    ("data encode list.json --model rflow-ct --out new", "model rflow-ct is not installed", "maisi models pull rflow-ct"),
]


@pytest.mark.parametrize(("line", "says", "hint"), CANNOT)
def test_missing_weights(line: str, says: str, hint: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(line, 3, says, hint, capsys)


@pytest.mark.parametrize("flags", ["--device cuda", "--device cuda:1", "--gpu 24g", "--device mps"])
def test_devices_that_this_machine_does_not_have(
    flags: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(f"{TINY_VOLUME} {flags}", 3, "this machine has no", "--device cpu", capsys)


@pytest.mark.parametrize(("flags", "code"), [("--device cuda", 3), ("--device mps", 3), ("--gpu 24g", 0), ("--device cuda --gpu 24g", 0)])
def test_a_dry_run_refuses_a_device_that_is_not_here_and_plans_for_one_elsewhere(
    flags: str, code: int, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "detect", lambda: devices.Gpu(name="processor", kind="cpu", memory_gib=8.0))
    monkeypatch.setattr("sys.platform", "linux")
    assert cli.run(shlex.split(f"{TINY_VOLUME} {flags} --dry-run")) == code
    text = capsys.readouterr()
    assert "volume 32x32x32 voxels" in text.out  # the plan is shown all the same
    assert text.err.count("error: ") == (code == 3)
    assert ("this machine has no" in text.err) == (code == 3)


def test_a_folder_that_may_not_be_written_to(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write anywhere
    refused(f"{TINY_VOLUME} --out {tmp_path / 'deep' / 'deeper'}", 3, f"{tmp_path} is not writable", "another --out", capsys)


TOML = [
    ("stpes = 3", "no setting named 'stpes' (from {origin})", "'steps'"),
    ("[volum]\nsize = [32, 32, 32]", "no setting named 'volum' (from {origin})", "'volume'"),
    ("[volume]\nsiz = [32, 32, 32]", "no setting named 'siz' (from {origin})", "'size'"),
    ("volume = 3", "volume is 3, not a table (from {origin})", "[volume]"),
    ("steps = 'few'", "--steps 'few' ({origin})", "whole number"),
    ("[steps]\na = 1", "--steps {{'a': 1}} ({origin})", "whole number"),
    ("steps = [", "{origin} cannot be read", "correct the file"),
    ("size = '1x2'", "size '1x2' is not three numbers joined by x (from {origin})", "512x512x128"),
    ("preset = 'chset'", "no region preset named 'chset'", "'chest'"),
    (b"\xff\xfe\x00", "{origin} cannot be read", "correct the file"),
]


@pytest.mark.parametrize("command", ["generate", "generate --dry-run", "gpu-plan"])
@pytest.mark.parametrize(("text", "says", "hint"), TOML)
def test_wrong_config_files(
    text: str | bytes, says: str, hint: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    for own in (True, False):
        path = tmp_path / ("user.toml" if own else "maisi.toml")
        path.write_bytes(content)
        monkeypatch.setenv("MAISI_CONFIG", str(path) if own else str(tmp_path / "none.toml"))
        before = tree(tmp_path)
        refused(command, 2, says.format(origin=path if own else path.name), hint, capsys)
        assert tree(tmp_path) == before
        path.unlink()


@pytest.mark.parametrize(
    ("variable", "value", "says", "hint"),
    [
        ("MAISI_STPES", "3", "no environment setting named 'MAISI_STPES'", "'MAISI_STEPS'"),
        ("MAISI_STEPS", "few", "--steps 'few' (environment MAISI_STEPS)", "whole number"),
        ("MAISI_STEPS", "", "--steps '' (environment MAISI_STEPS)", "whole number"),
        ("MAISI_PREVIEW", "maybe", "--preview 'maybe' (environment MAISI_PREVIEW)", "true or false"),
        ("MAISI_SIZE", "1x2", "size '1x2' is not three numbers joined by x (from environment MAISI_SIZE)", "512x512x128"),
        ("MAISI_PRESET", "chset", "no region preset named 'chset'", "'chest'"),
    ],
)
def test_wrong_environment(
    variable: str, value: str, says: str, hint: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    refused("generate --dry-run", 2, says, hint, capsys)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("first line\nsecond line"), 70, "a bug in maisi: RuntimeError: first line"),
        (MemoryError(), 3, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB\nmore"), 3, "CUDA out of memory. Tried 2 GiB"),
    ],
)
def test_what_is_not_foreseen_is_one_line_too(
    error: Exception, code: int, says: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("maisi_cli.manifest.resolve", fail)
    refused("generate", code, says, "", capsys)
    monkeypatch.setenv("MAISI_DEBUG", "1")
    if code == 70:
        with pytest.raises(RuntimeError):
            cli.run(["generate"])
