"""Manifests: a row for every sample, with an id and settings of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maisi_cli import catalog, generate, synthesis
from maisi_cli.cli import run
from maisi_cli.errors import Rejected, UsageError
from maisi_cli.manifest import read_manifest, resolve_all
from maisi_cli.masks import NoMask
from maisi_cli.settings import sample_id
from maisi_cli.volumes import read_mask

SMALL: dict[str, Any] = {"mode": "mask", "size": "64x64x64", "preview": False}


def csv_file(folder: Path, *lines: str) -> Path:
    path = folder / "cases.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_rows_have_the_settings_of_the_run_and_their_own(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "id,preset,seed,steps", "a,abdomen,5,", "b,,,7")
    first, second = resolve_all({"manifest": str(path), "preset": "chest", "steps": 9, "seed": 1})
    assert (first.settings.preset, first.settings.seed, first.settings.steps, first.index) == ("abdomen", 5, 9, 0)
    assert (second.settings.preset, second.settings.seed, second.settings.steps, second.index) == ("chest", 1, 7, 1)
    assert first.origins["preset"].origin == "manifest row a"
    assert ("chest", "command line") in first.origins["preset"].hides
    assert second.origins["seed"].origin == "command line"


def test_without_a_manifest_there_is_one_run(tmp_path: Path) -> None:
    (only,) = resolve_all({"preset": "abdomen", "count": 3})
    assert (only.settings.count, only.index) == (3, None)


@given(st.dictionaries(st.text("abcXYZ019 -_", min_size=1, max_size=8).filter(lambda text: text.strip() == text),
                       st.integers(0, 99), min_size=1, max_size=5))  # fmt: skip
def test_csv_and_json_lines_say_the_same(rows: dict[str, int]) -> None:
    import tempfile

    unique = {name.casefold(): (name, seed) for name, seed in rows.items()}.values()
    with tempfile.TemporaryDirectory() as folder:
        table = csv_file(Path(folder), "id,seed", *(f"{name},{seed}" for name, seed in unique))
        lines = Path(folder) / "cases.jsonl"
        lines.write_text("\n".join(json.dumps({"id": name, "seed": seed}) for name, seed in unique), "utf-8")
        read = [(row.id, int(row.values["seed"])) for row in read_manifest(table)]
        assert read == [(row.id, row.values["seed"]) for row in read_manifest(lines)] == list(unique)


def test_paths_are_seen_from_the_manifest(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "id,mask,model", "a,masks/one.nii.gz,own.toml", "b,/abs/two.nii.gz,nano-ct")
    first, second = read_manifest(path)
    assert first.values == {"mask": str(tmp_path / "masks/one.nii.gz"), "model": str(tmp_path / "own.toml")}
    assert second.values == {"mask": "/abs/two.nii.gz", "model": "nano-ct"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["seed", "1"], "no column id"),
        (["id,sead", "a,1"], "sead"),
        (["id,seed", "a,1", "A,2"], "twice"),
        (["id,seed", ",1"], "no id"),
        (["id,seed"], "no rows"),
        (["id,seed", "a,1,2"], "number of cells"),
        (["id,seed", "a"], "number of cells"),
        (["id,out", "a,b"], "of the whole run"),
        (["id,seed", "a,soon"], "seed"),
        (["id,size", "a,33x33x33"], "33x33x33"),
        (["id,seed", "../a,1"], "file name"),
    ],
)
def test_wrong_manifests_are_refused_before_anything_is_made(
    tmp_path: Path, lines: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = csv_file(tmp_path, *lines)
    out = tmp_path / "run"
    assert run(["generate", "--manifest", str(path), "--mode", "mask", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) <= 2
    assert not out.exists()


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "not an object"), ("", "no rows")])
def test_wrong_json_lines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=message):
        read_manifest(path)


def test_a_manifest_that_is_not_there_and_one_beside_a_count(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        resolve_all({"manifest": str(tmp_path / "none.csv")})
    with pytest.raises(UsageError, match="exclude each other"):
        resolve_all({"manifest": str(csv_file(tmp_path, "id", "a")), "count": 2})


def test_each_row_is_a_sample_of_its_own_and_can_be_repeated_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_file(tmp_path, "id,preset,seed", "one,abdomen,", "two {x},chest,", "three,abdomen,4")
    out = tmp_path / "run"
    made = list(generate(manifest=str(path), out=str(out), seed=9, **SMALL))
    assert [sample.id for sample in made] == ["one", "two {x}", "three"]
    assert [(sample.index, sample.seed) for sample in made] == [(0, 9), (1, 9), (2, 4)]
    assert {file.name for file in out.iterdir()} == {"labels.json"} | {
        f"{name}_{end}" for name in ("one", "two {x}", "three") for end in ("label.nii.gz", "record.json")
    }
    alone = tmp_path / "alone"
    assert run(["generate", "--config", str(out / "two {x}_record.json"), "--out", str(alone)]) == 0
    capsys.readouterr()
    again, first = read_mask(alone / "two {x}_label.nii.gz"), read_mask(out / "two {x}_label.nii.gz")
    assert np.array_equal(again.array, first.array)
    assert len(list(alone.iterdir())) == 3  # label, record, labels.json


def test_rows_without_a_seed_share_the_one_that_is_drawn(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "id,seed", "a,3", "b,", "c,")
    seeds = [sample.seed for sample in generate(manifest=str(path), out=str(tmp_path / "run"), **SMALL)]
    assert seeds[0] == 3
    assert seeds[1] == seeds[2]


def test_resuming_makes_only_what_is_missing_and_shards_share_the_rows(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "id", "a", "b", "c", "d")
    common = {"manifest": str(path), "seed": 2, "out": str(tmp_path / "run"), **SMALL}
    assert [sample.id for sample in generate(**common, shard="2/2")] == ["b", "d"]
    assert [sample.id for sample in generate(**common, resume=True)] == ["a", "c"]
    assert list(generate(**common, resume=True)) == []


def test_a_later_row_that_cannot_be_made_is_refused_before_the_first_is_made(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "id,mask", "a,", "b,none.nii.gz")
    with pytest.raises(UsageError, match=r"none\.nii\.gz"):
        generate(manifest=str(path), out=str(tmp_path / "run"), mode="mask", preview=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_masks_makes_an_image_for_each_and_each_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "masks"
    list(generate(**SMALL, count=2, seed=3, name="case{index}", out=str(given)))
    words = ["generate", "--mask", str(given), "--mode", "mask", "--seed", "5", "--tumor", "liver:30mm", "-q"]
    assert run([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sample["id"] for sample in samples] == ["case0_label", "case1_label"]
    assert run(["generate", "--config", samples[1]["record"], "--out", str(tmp_path / "again"), "-q"]) == 0
    again = Path(capsys.readouterr().out.splitlines()[0])
    assert again.read_bytes() == Path(samples[1]["label"]).read_bytes()
    assert again.read_bytes() != (given / "case1_label.nii.gz").read_bytes()  # it has a tumour of its own


def test_several_images_of_each_mask_of_a_folder_are_numbered(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    rows = resolve_all({"mask": str(tmp_path), "count": 2, "seed": 1})
    assert [sample_id(row.settings, catalog.model(row.settings.model), 0) for row in rows] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert {row.settings.count for row in rows} == {1}
    (tmp_path / "a.nii").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds a.nii and a.nii.gz"):
        resolve_all({"mask": str(tmp_path)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no label map"):
        resolve_all({"mask": str(tmp_path / "empty")})


def test_a_dry_run_shows_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_file(tmp_path, "id,preset,seed", "one,abdomen,3", "two,chest,")
    assert run(["generate", "--manifest", str(path), "--mode", "mask", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["id"], row["seed"], row["problem"]) for row in rows] == [("one", 3, None), ("two", None, None)]
    assert run(["generate", "--manifest", str(path), "--mode", "mask", "--dry-run"]) == 0
    assert "two" in capsys.readouterr().out


def test_a_row_without_a_mask_does_not_keep_the_others_from_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = csv_file(tmp_path, "id", "a", "b")
    original = synthesis._Run._mask

    def none_for_the_first(run: Any, job: synthesis.Job, attempt: int) -> Any:
        if job.index == 0:
            raise NoMask("none of 4 masks could be used", hint="use a larger --fov")
        return original(run, job, attempt)

    monkeypatch.setattr(synthesis._Run, "_mask", none_for_the_first)
    made = []
    with pytest.raises(Rejected, match="1 of 2 samples"):
        made.extend(generate(manifest=str(path), out=str(tmp_path / "run"), seed=1, retries=0, **SMALL))
    assert [file.name for file in sorted((tmp_path / "run").iterdir())] == ["b_label.nii.gz", "b_record.json", "labels.json"]
