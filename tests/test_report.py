"""The report of a run: what the page holds, that nothing of a run can act in it, and that it works in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from maisi_cli import cli, record
from maisi_cli.errors import UsageError
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body, render
from maisi_cli.preview import preview
from maisi_cli.quality import Finding, Verdict
from maisi_cli.report import report
from maisi_cli.report.html import Html, tag
from maisi_cli.report.page import WINDOWS
from maisi_cli.report.samples import AXIS_LIMIT, packed, shrink
from maisi_cli.volumes import Mask, Volume, write_image, write_mask

from .browser import Browser, browser, programs
from .shell import Done

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>\"'&"
SETTINGS = {
    "seed": (7, "command line"),
    "steps": (30, "model nano-ct"),
    "size": ((32, 32, 32), "preset chest-abdomen"),
    "tumor": (None, "default"),
}
DATA = files("maisi_cli") / "data" / "report"


def finding(**changes: Any) -> Finding:
    given = {
        "check": "hu-median",
        "label": "liver",
        "value": 55.5,
        "low": -21.6,
        "high": 162.0,
        "passed": True,
        "text": "55.5 HU in the liver",
    }
    return Finding(**{**given, **changes})


def sample(
    folder: Path,
    id: str,
    image: Volume | None,
    mask: Mask | None,
    *,
    stem: str = "",
    index: int = 0,
    findings: tuple[Finding, ...] = (finding(),),
    **changes: Any,
) -> Path:
    """Write a sample and its record as a run would; return the record's path."""
    stem = stem or id
    outputs = {}
    if image is not None:
        outputs["image"] = write_image(image, folder / f"{stem}_image.nii.gz")
    if mask is not None:
        outputs["label"] = write_mask(mask, folder / f"{stem}_label.nii.gz")
    outputs["preview"] = preview(image, mask, folder / f"{stem}_preview.png")
    item = image if image is not None else mask
    assert item is not None
    weights = [{"part": "vae", "file": "vae.safetensors", "sha256": "ab" * 32}]
    given: dict[str, Any] = {
        "id": id,
        "index": index,
        "seed": 7,
        "attempt": 0,
        "derived_seed": 1,
        "settings": {key: value for key, (value, _) in SETTINGS.items()},
        "origins": {key: origin for key, (_, origin) in SETTINGS.items()},
        "model": {"name": "nano-ct", "licence": "Apache-2.0", "commercial": True, "weights": weights},
        "geometry": item.geometry,
        "modality": image.modality if image is not None else "ct",
        "mask": {"source": "phantom", "ids": [1]},
        "verdict": Verdict(findings=findings) if findings else None,
        "outputs": outputs,
        "seconds": {"mask": 1.5, "denoise": 20.25, "decode": 4.0, "save": 0.25},
        "peak_gib": 1.25,
        "device": {"name": "cpu", "dtype": "fp32"},
        "notes": ["a note"],
    }
    made = record.build(**{**given, **changes})
    made["timing"]["finished"] = "2026-01-02T03:04:05+00:00"
    return record.write(folder / f"{stem}_record.json", made)


def torso(seed: int, size: tuple[int, int, int] = (32, 32, 32)) -> tuple[Volume, Mask]:
    mask = body(Geometry(size=size, spacing=(384 / size[0], 300 / size[1], 400 / size[2])), seed, regions=("chest", "abdomen"))
    return render(mask, seed), mask


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a sample of every kind, made once."""
    folder = tmp_path_factory.mktemp("prepared") / "my run"
    folder.mkdir()
    image, mask = torso(1)
    sample(folder, "one", image, mask, index=0)
    bad = finding(value=300.0, passed=False, text="300 HU in the liver, above 162")
    image, mask = torso(2)
    sample(folder, "failed", image, mask, index=1, findings=(finding(), bad, finding(check="follows-mask", value=-30.0, informative=True)))
    sample(folder, "mask-only", None, mask, index=2, findings=())
    waves = np.indices((24, 20, 16)).sum(axis=0).astype(np.int16) * 10
    sample(folder, "brain", Volume(array=waves, geometry=Geometry(size=(24, 20, 16), spacing=(1, 1, 2)), modality="mri-t1"), None, index=3)
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """Return a copy of the prepared run."""
    return Path(shutil.copytree(prepared, tmp_path / "my run"))


@dataclass
class Page(HTMLParser):
    """What a browser would find in a page: elements, scripts by id, and text."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: dict[str, str] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.inside: str | None = None
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = f"script {dict(attrs).get('id', '')}" if tag == "script" else tag if tag == "style" else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside.startswith("script "):
            key = self.inside.removeprefix("script ")
            self.scripts[key] = self.scripts.get(key, "") + data
        elif self.inside is None:
            self.text += data

    @property
    def viewer(self) -> dict[str, Any]:
        """What the viewer is told."""
        return json.loads(self.scripts["run"])

    def volume(self, id: str) -> np.ndarray:
        """Return an embedded volume, unpacked as the page does it."""
        kind, _, number = id.partition("-")
        data = zlib.decompress(base64.b64decode(self.scripts[id]))
        n = len(data) // (2 if kind == "image" else 1)
        planes = np.frombuffer(data, np.uint8)
        flat = planes if kind == "label" else (planes[:n].astype(np.uint16) | (planes[n:].astype(np.uint16) << 8)).view(np.int16)
        return flat.reshape(self.viewer["samples"][int(number)]["size"], order="F")


def page(run: Path, **options: Any) -> Page:
    """Write the report of a run and read it."""
    return Page(report(run, force=True, **options).path.read_text("utf-8"))


@pytest.fixture(scope="module")
def seen(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Return the page of the prepared run, made once."""
    return page(prepared, out=tmp_path_factory.mktemp("seen") / "page.html")


def maisi(capsys: pytest.CaptureFixture[str], *words: str) -> Done:
    code = cli.run(list(words))
    text = capsys.readouterr()
    return Done(code, text.out, text.err)


# --- what the page holds ------------------------------------------------------------------------------------


def test_the_page_tells_of_samples_settings_checks_times_and_licence(seen: Page) -> None:
    made = seen
    for wanted in ("my run", "one", "failed", "mask-only", "brain",
                   "preset chest-abdomen", "command line", "32x32x32",
                   "300 HU in the liver, above 162", "-21.6 to 162", "not checked", "2 of 3 passed",
                   "20.2", "1.25 GiB", "cpu fp32", "a note", "2026-01-02 03:04:05 UTC",
                   "Apache-2.0, commercial use allowed", "ab" * 32, "Synthetic.", "not for diagnosis", "BSD 2-Clause License"):  # fmt: skip
        assert wanted in made.text, wanted
    assert made.text.index("300 HU in the liver, above 162") < made.text.index("follows-mask")  # what failed comes first


def test_settings_left_at_their_defaults_are_folded(seen: Page) -> None:
    made = seen.source
    chosen, _, left = made.partition("1 settings at their defaults")
    assert ">tumor<" in left
    assert ">tumor<" not in chosen
    assert ">steps<" in chosen


def test_a_setting_that_differs_says_how(run: Path) -> None:
    path = run / "one_record.json"
    made = json.loads(path.read_text())
    made["settings"]["steps"] = {"value": 8, "origin": "manifest"}
    path.write_text(json.dumps(made))
    assert "8 (1 sample), 30 (3 samples)" in page(run).text


def test_the_page_opens_no_connection(seen: Page) -> None:
    made = seen
    assert "http://" not in made.source
    assert "https://" not in made.source
    for name, attributes in made.tags:
        for key in ("src", "href"):
            if attributes.get(key) is not None:
                assert attributes[key].startswith("data:image/png;base64," if name == "img" else "#"), (name, attributes[key][:80])
    assert not {name for name, _ in made.tags} & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    assert "url(" not in made.source.partition("</style>")[0]


def test_only_the_two_scripts_of_the_package_may_run(seen: Page) -> None:
    made = seen
    (policy,) = [attributes["content"] for _, attributes in made.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    niivue = (DATA / "niivue.umd.js").read_bytes()
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in (made.scripts[""].encode(), niivue)}
    assert set(rules["script-src"].split()) == hashes
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    assert rules["img-src"] == "data: blob:"


def test_links_within_the_page_lead_somewhere(seen: Page) -> None:
    made = seen
    ids = [attributes["id"] for _, attributes in made.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for _, attributes in made.tags if "href" in attributes} <= set(ids)
    assert {attributes["aria-labelledby"] for _, attributes in made.tags if "aria-labelledby" in attributes} <= set(ids)
    assert all(
        attributes.get("alt") and attributes.get("width") and attributes.get("height") for name, attributes in made.tags if name == "img"
    )


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = report(run).path.read_bytes()
    monkeypatch.chdir(run.parent)
    assert report(Path("my run"), tmp_path / "elsewhere" / "page.html").path.read_bytes() == first


# --- nothing of a run acts in the page ----------------------------------------------------------------------


def test_whatever_a_run_says_is_text(tmp_path: Path) -> None:
    image, mask = torso(3)
    seen = finding(text=f"text {ATTACK}", label=f"label {ATTACK}", check=f"check {ATTACK}")
    path = sample(
        tmp_path,
        f"id {ATTACK}",
        image,
        mask,
        stem="case",
        findings=(seen,),
        notes=[f"note {ATTACK}"],
        model={"name": f"model {ATTACK}", "licence": f"licence {ATTACK}", "weights": []},
        seconds={f"stage {ATTACK}": 1.0},
        device={"name": f"device {ATTACK}"},
    )
    made = json.loads(path.read_text())
    made["settings"][f"setting {ATTACK}"] = {"value": f"value {ATTACK}", "origin": f"origin {ATTACK}"}
    made["mask"] = {f"key {ATTACK}": f"mask {ATTACK}"}
    made["modality"] = f"modality {ATTACK}"
    made["timing"]["finished"] = f"finished {ATTACK}"
    made["outputs"][f"kind {ATTACK}"] = {"file": f"file {ATTACK}", "sha256": f"hash {ATTACK}"}
    path.write_text(json.dumps(made))
    distances = {
        "schema": "maisi.fid/1",
        "fid": {f"plane {ATTACK}": 1.0},
        f"fact {ATTACK}": f"fid {ATTACK}",
        "warnings": [f"warning {ATTACK}"],
    }
    (tmp_path / "fid.json").write_text(json.dumps(distances))
    found = page(tmp_path)
    for word in ("id", "text", "label", "check", "note", "model", "licence", "stage", "device", "mask", "key", "setting", "value", "origin",
                 "modality", "finished", "kind", "file", "hash", "plane", "fact", "fid", "warning"):  # fmt: skip
        assert f"{word} {ATTACK}" in found.text, word
    assert [attributes.get("id") for name, attributes in found.tags if name == "script"] == ["run", "image-0", "label-0", "niivue", None]
    assert found.viewer["samples"][0]["id"] == f"id {ATTACK}"
    assert all(attributes.get("src") != "x" for _, attributes in found.tags)
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]


def test_a_tag_escapes_content_and_attributes() -> None:
    assert (
        tag("p", "<b>", Html("<b>x</b>"), None, title='"', data_of=3, hidden=True, class_=None)
        == '<p title="&quot;" data-of="3" hidden>&lt;b&gt;<b>x</b></p>'
    )


@pytest.mark.parametrize("name", ["../secret_image.nii.gz", "/secret_image.nii.gz", "sub/secret_image.nii.gz"])
def test_files_outside_of_the_run_are_not_read(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    image, _ = torso(1)
    sample(run, "one", image, None)
    for place in (tmp_path, run / "sub"):
        write_image(image, place / "secret_image.nii.gz")
    path = run / "one_record.json"
    made = json.loads(path.read_text())
    for kind in ("image", "preview"):
        made["outputs"][kind]["file"] = name.replace("/secret", f"{tmp_path}/secret", 1) if name.startswith("/") else name
    path.write_text(json.dumps(made))
    (entry,) = report(run).entries
    assert entry.shown_as == "nothing"
    assert "is missing" in entry.notes[0]


# --- volumes ------------------------------------------------------------------------------------------------


def test_a_small_volume_comes_back_voxel_for_voxel(seen: Page) -> None:
    image, mask = torso(1)
    made = seen
    assert np.array_equal(made.volume("image-0"), np.rint(image.array).astype(np.int16))
    assert np.array_equal(made.volume("label-0"), mask.array)
    assert made.viewer["samples"][0]["spacing"] == [12.0, 9.375, 12.5]


def test_the_references_label_numbers_are_named_after_what_was_asked_for(tmp_path: Path) -> None:
    image, mask = torso(1)
    renumbered = Mask(
        array=np.where(mask.array == 3, 1, np.where(mask.array == 1, 2, 0)).astype(np.uint8), geometry=mask.geometry, vocabulary="reference"
    )
    settings = {"compat": "reference", "anatomy": ["spleen", "liver"], "anatomy_size": []}
    sample(tmp_path, "one", image, renumbered, settings=settings, origins=dict.fromkeys(settings, "command line"))
    made = page(tmp_path)
    assert {name for name, _ in made.viewer["labels"].values()} == {"spleen", "liver"}
    assert np.array_equal(made.volume("label-0"), np.where(np.isin(mask.array, (1, 3)), mask.array, 0))


def test_packing_keeps_every_int16() -> None:
    values = np.array([-32768, -1, 0, 1, 255, 256, 32767, -1000], dtype=np.int16).reshape(2, 2, 2)
    data = zlib.decompress(base64.b64decode(packed(values)))
    flat = np.frombuffer(data, np.uint8).reshape(2, -1)
    assert np.array_equal(flat[0] | (flat[1].astype(np.uint16) << 8), values.ravel(order="F").view(np.uint16))


def test_shrinking_takes_the_mean_of_what_a_voxel_covers() -> None:
    array = np.arange(6 * 4 * 3, dtype=np.float32).reshape(6, 4, 3) * 4
    geometry = Geometry(size=(6, 4, 3), spacing=(1, 1, 1))
    small = shrink(Volume(array=array, geometry=geometry), (3, 2, 3))
    assert np.array_equal(small.array, np.rint(array.reshape(3, 2, 2, 2, 3).mean(axis=(1, 3))))
    assert small.geometry.fov_mm == geometry.fov_mm
    third = shrink(
        Volume(array=np.array([0, 30, 60], dtype=np.float32).reshape(3, 1, 1), geometry=Geometry(size=(3, 1, 1), spacing=(1, 1, 1))),
        (2, 1, 1),
    )
    assert third.array.ravel().tolist() == [10, 50]  # a whole voxel and half of the middle one


def test_a_large_volume_is_averaged_down_and_the_page_says_so(tmp_path: Path) -> None:
    big = np.full((140, 20, 150), 40, dtype=np.int16)
    big[:, :, 75:] = -700
    sample(tmp_path, "big", Volume(array=big, geometry=Geometry(size=big.shape, spacing=(1.0, 2.0, 3.0))), None)
    made = page(tmp_path)
    assert f"averaged down to at most {AXIS_LIMIT} voxels an axis" in made.text
    assert "140x20x150 voxels of 1x2x3 mm" in made.text
    shown = made.viewer["samples"][0]
    assert shown["size"] == [128, 20, 128]
    assert shown["full"] == [140, 20, 150]
    assert np.allclose(np.multiply(shown["size"], shown["spacing"]), (140, 40, 450))
    volume = made.volume("image-0")
    assert set(np.unique(volume)) == {40, -700}
    assert volume.mean() == pytest.approx(big.mean())


def test_failed_samples_are_embedded_before_others(run: Path) -> None:
    shown = {each.case.id: each.shown_as for each in report(run, volumes=2).entries}
    assert shown == {"one": "volume", "failed": "volume", "mask-only": "picture", "brain": "picture"}
    shown = {each.case.id: each.shown_as for each in report(run, volumes=1, force=True).entries}
    assert shown == {"one": "picture", "failed": "volume", "mask-only": "picture", "brain": "picture"}


def test_a_page_without_volumes_has_pictures_and_no_3d_view(run: Path) -> None:
    made = page(run, volumes=0)
    assert set(made.scripts) == {"run", ""}
    assert sum(name == "img" for name, _ in made.tags) == 4
    assert "0 of 4 samples are here as volumes" in made.text
    assert len(made.source) < 500_000
    assert "BSD 2-Clause" not in made.text


def test_the_bytes_of_a_sample_are_those_in_the_page(run: Path) -> None:
    written = report(run)
    made = Page(written.path.read_text("utf-8"))
    assert written.bytes == written.path.stat().st_size
    pictures = [len(attributes["src"].partition(",")[2]) for name, attributes in made.tags if name == "img"]
    for k, entry in enumerate(written.entries):
        volumes = sum(len(text) for id, text in made.scripts.items() if id in (f"image-{k}", f"label-{k}"))
        assert entry.bytes == pictures[k] + volumes
    assert sum(len(text) for text in made.scripts.values()) < written.bytes


# --- what is missing or damaged -----------------------------------------------------------------------------


def test_a_missing_image_is_a_placeholder_and_a_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "brain_image.nii.gz").unlink()
    (run / "brain_preview.png").unlink()
    (run / "one_image.nii.gz").unlink()
    done = maisi(capsys, "report", str(run))
    assert done.code == 0
    assert "warning: brain: brain_image.nii.gz is missing" in done.err
    made = Page((run / "report.html").read_text("utf-8"))
    assert "brain_image.nii.gz is missing" in made.text
    assert "no image" in made.text
    assert made.viewer["samples"][0]["kinds"] == ["label"]


def test_a_stored_preview_stands_in_for_lost_volumes(run: Path) -> None:
    (run / "brain_image.nii.gz").unlink()
    assert {each.case.id: each.shown_as for each in report(run).entries}["brain"] == "picture"
    (run / "brain_preview.png").write_bytes(b"no picture")
    assert {each.case.id: each.shown_as for each in report(run, force=True).entries}["brain"] == "nothing"


def test_a_damaged_or_changed_image_is_noted(run: Path) -> None:
    data = (run / "brain_image.nii.gz").read_bytes()
    (run / "brain_image.nii.gz").write_bytes(data[:-30])
    image, _ = torso(9)
    write_image(image, run / "one_image.nii.gz", force=True)
    notes = {each.case.id: each.notes for each in report(run).entries}
    assert notes["one"] == ("one_image.nii.gz is not the file that was recorded: its SHA-256 differs",)
    assert any("brain_image.nii.gz is damaged" in note for note in notes["brain"])
    assert str(run) not in "".join(notes["brain"])
    assert notes["failed"] == ()


def test_image_and_labels_on_two_grids_are_not_laid_over_one_another(run: Path) -> None:
    _, mask = torso(1, (32, 32, 16))
    write_mask(mask, run / "one_label.nii.gz", force=True)
    entry = report(run).entries[0]
    assert "different grids" in entry.notes[-1]
    assert set(entry.payloads) == {"image"}


def cut_short(path: Path) -> None:
    path.write_text(path.read_text()[:200])


def without(*keys: str) -> Any:
    def change(path: Path) -> None:
        made = inner = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        path.write_text(json.dumps(made))

    return change


def having(key: str, value: Any) -> Any:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_short, "is not JSON"),
        (without("timing"), "it lacks 'timing'"),
        (without("qc", "findings"), "it lacks 'findings'"),
        (without("settings"), "lacks settings"),
        (having("index", "first"), "'first' is not a whole number"),
        (having("timing", {"seconds": {"mask": "long"}, "peak_gib": None, "finished": ""}), "'long' is not a number"),
        (having("model", []), "is a damaged record"),
        (having("geometry", None), "is a damaged record"),
        (having("notes", [1]), "1 is not text"),
        (having("schema", "maisi.record/9"), "maisi.record/9"),
    ],
)
def test_a_damaged_record_is_one_line(damage: Any, says: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "one_record.json")
    done = maisi(capsys, "report", str(run), "-q")
    assert done.code == 2
    assert done.out == ""
    error, _hint = done.err.splitlines()
    assert error.startswith("error: ")
    assert "one_record.json" in error
    assert says in error
    assert not (run / "report.html").exists()


def test_wrong_use_is_refused_and_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for words, says in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(run / "one_record.json")], "is a file"),
        ([str(tmp_path / "empty")], "holds no *_record.json"),
        ([str(run), "--volumes", "-1"], "--volumes"),
        ([str(run), "--out", str(tmp_path / "empty")], "is a folder"),
    ):
        done = maisi(capsys, "report", *words)
        assert (done.code, done.out) == (2, ""), words
        assert says in done.err, words
        assert len(done.err.splitlines()) == 2
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_is_not_replaced_unless_forced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").write_text("mine")
    done = maisi(capsys, "report", str(run))
    assert done.code == 2
    assert "report.html already exists" in done.err
    assert (run / "report.html").read_text() == "mine"
    assert maisi(capsys, "report", str(run), "--force").code == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match="already exists"):
        report(run)


# --- distances ----------------------------------------------------------------------------------------------


def test_results_of_fid_in_the_run_are_shown(run: Path) -> None:
    found = {
        "schema": "maisi.fid/1",
        "fid": {"xy": 1.5, "yz": 2.25, "zx": 3.0, "average": 2.25},
        "ci95": {"xy": [1.25, 1.75], "average": [2.0, 2.5]},
        "baseline": {"xy": 0.5, "average": 0.625, "volumes": 10, "at_these_sizes": {"xy": 0.875, "average": 1.125}},
        "kid": {"xy": {"value": 0.0125, "error": 0.002}, "slices": 320},
        "n_volumes": {"real": 20, "synthetic": 4},
        "features": {"name": "nano-features"},
        "warnings": ["4 volumes are few"],
    }
    (run / "test_fid.json").write_text(json.dumps(found))
    (run / "fid_newer.json").write_text('{"schema": "maisi.fid/2"}')
    (run / "fid_other.json").write_text('{"schema": "other"}')
    (run / "fid_half.json").write_text('{"schema": "maisi.fid/1", ')
    written = report(run)
    text = Page(written.path.read_text()).text
    for wanted in (
        "test_fid.json",
        "XY",
        "1.25 to 1.75",
        "0.625",
        "nano-features",
        "n volumes synthetic",
        "4 volumes are few",
        "FID, average of planes",
    ):
        assert wanted in text, wanted
    assert written.fid == ("test_fid.json",)
    assert [note.split(" and ")[0] for note in written.notes] == [
        "fid_half.json is not JSON", "fid_newer.json comes from another version (maisi.fid/2, not maisi.fid/1)",
    ]  # fmt: skip
    assert "fid_half.json is not JSON" in text


def test_without_distances_there_is_no_panel(run: Path) -> None:
    assert "FID" not in page(run).text


@pytest.mark.parametrize(
    "data", [{}, {"fid": None}, {"fid": []}, {"fid": {"xy": "none"}, "ci95": [1], "baseline": 3, "warnings": "few"}, {"fid": {"xy": 0}}]
)
def test_a_result_of_another_form_does_no_harm(data: dict[str, Any], run: Path) -> None:
    (run / "fid.json").write_text(json.dumps({"schema": "maisi.fid/1", **data}))
    assert "fid.json" in page(run).text


# --- the command --------------------------------------------------------------------------------------------


def test_json_tells_the_size_of_each_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = maisi(capsys, "report", str(run), "--json", "--volumes", "2")
    assert done.code == 0
    assert done.json["schema"] == "maisi.report/1"
    assert done.json["report"] == str(run / "report.html")
    assert done.json["bytes"] == (run / "report.html").stat().st_size
    assert [(each["id"], each["passed"], each["shown_as"]) for each in done.json["samples"]] == [
        ("one", True, "volume"), ("failed", False, "volume"), ("mask-only", None, "picture"), ("brain", True, "picture"),
    ]  # fmt: skip
    assert all(each["bytes"] > 0 for each in done.json["samples"])


def test_the_examples_of_the_help_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["report", "--help"]) == 0
    lines = re.findall(r"^ +maisi (report .*)$", capsys.readouterr().out, flags=re.M)
    assert len(lines) == 2
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        done = maisi(capsys, *line.split())
        assert done.code == 0, (line, done.err)
        assert done.paths[0].is_file()


def test_the_page_of_the_docs_says_what_is_so() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "report.md").read_text("utf-8")
    for name, low, high in WINDOWS:
        assert f"{name.lower()} {(low + high) / 2:g}, {high - low:g}" in text
    assert f"more than {AXIS_LIMIT} voxels" in text
    command = typer.main.get_command(cli.build()).commands["report"]
    options = {flag for each in command.params for flag in each.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= options
    assert {line.strip() for line in command.epilog.splitlines() if "maisi report" in line} == {
        line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("maisi report")
    }


def test_a_report_needs_no_torch(run: Path) -> None:
    code = f"""
import sys
from maisi_cli.report import report
report({str(run)!r})
print(sorted({{'torch', 'monai', 'rich'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_3d_view_is_the_one_that_is_described() -> None:
    text = (DATA / "README.md").read_text("utf-8")
    assert hashlib.sha256((DATA / "niivue.umd.js").read_bytes()).hexdigest() in text
    assert "Copyright (c) 2021, Niivue" in (DATA / "niivue.LICENSE.txt").read_text("utf-8")
    script = (DATA / "report.js").read_text("utf-8")
    assert "</" not in script + (DATA / "report.css").read_text("utf-8")
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|eval|innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", script
    )


# --- in a browser -------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(programs() is None, reason="needs chromium and chromedriver on the path")
PIXELS = "return document.querySelector(arguments[0]).toDataURL()"
SLICE = "return Number(document.querySelector(`[data-plane=${arguments[0]}]`).dataset.slice)"
SETTLED = "return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
AXIAL = '[data-plane="axial"] canvas'


@pytest.fixture(scope="module")
def shown(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "run").mkdir()
    for path in prepared.iterdir():
        shutil.copy(path, folder / "run")
    attacked = json.loads((folder / "run" / "brain_record.json").read_text())
    attacked["id"] = ATTACK
    (folder / "run" / "brain_record.json").write_text(json.dumps(attacked))
    report(folder / "run", folder / "page.html", volumes=3)
    with browser(folder / "profile", "--enable-unsafe-swiftshader") as session:
        session.size(1400, 950)
        session.prefer("light")
        session.open(folder / "page.html")
        session.wait("return document.documentElement.dataset.ready === '0'")
        session.run(SETTLED)
        yield session


def pixels(session: Browser, selector: str = AXIAL) -> str:
    session.run(SETTLED)
    return str(session.run(PIXELS, selector))


@needs_browser
def test_wheel_and_keys_change_the_slice(shown: Browser) -> None:
    start, before = shown.run(SLICE, "axial"), pixels(shown)
    shown.wheel(AXIAL, 100)
    assert shown.run(SLICE, "axial") == start - 1
    assert pixels(shown) != before
    shown.wheel(AXIAL, -100)
    assert shown.run(SLICE, "axial") == start
    assert pixels(shown) == before
    for key, there in (("ArrowUp", start + 1), ("ArrowDown", start), ("PageUp", start + 10), ("End", 32), ("Home", 1), ("ArrowDown", 1)):
        shown.keys(AXIAL, key)
        assert shown.run(SLICE, "axial") == there, key
    assert shown.run(f"return document.querySelector('{AXIAL}').getAttribute('aria-valuetext')") == "slice 1 of 32"
    assert shown.run("return window.scrollY") == 0  # the wheel turned the slices and not the page


@needs_browser
def test_dragging_in_a_plane_moves_the_others(shown: Browser) -> None:
    shown.drag(AXIAL, 0, 0)
    middle = shown.run(SLICE, "sagittal"), shown.run(SLICE, "coronal")
    shown.drag(AXIAL, -40, 30)
    moved = shown.run(SLICE, "sagittal"), shown.run(SLICE, "coronal")
    assert moved[0] > middle[0]  # to the viewer's left is the patient's right, where x grows
    assert moved[1] < middle[1]  # down is posterior


@needs_browser
def test_windows_and_overlay_change_the_pixels(shown: Browser) -> None:
    shown.run("document.getElementById('label-list').querySelector('button').click()")  # where there is something to see
    shown.run("document.getElementById('label-list').querySelector('button').click()")
    seen = {"Soft tissue": pixels(shown)}
    for name in ("Lung", "Bone", "Brain", "Full"):
        shown.click(f'#windows input[value="{name}"]')
        seen[name] = pixels(shown)
    assert len(set(seen.values())) == 5
    shown.keys(AXIAL, "1")
    assert pixels(shown) == seen["Soft tissue"]
    assert shown.run("return [level.value, width.value]") == ["40", "400"]
    shown.keys(AXIAL, "o")
    bare = pixels(shown)
    assert bare != seen["Soft tissue"]
    shown.keys(AXIAL, "o")
    shown.run("opacity.value = 0; opacity.dispatchEvent(new Event('input'))")
    assert pixels(shown) == bare
    shown.run("opacity.value = 45; opacity.dispatchEvent(new Event('input'))")
    assert pixels(shown) == seen["Soft tissue"]
    shown.run("width.value = 800; width.dispatchEvent(new Event('input'))")
    assert pixels(shown) != seen["Soft tissue"]
    assert shown.run("return document.querySelectorAll('#windows input:checked').length") == 0
    shown.keys(AXIAL, "1")


@needs_browser
def test_a_label_is_found_and_named(shown: Browser) -> None:
    shown.run("[...document.querySelectorAll('#label-list button')].find((each) => each.textContent.startsWith('liver')).click()")
    assert "liver (1)" in shown.run("return readout.textContent")
    assert re.search(r"-?\d+ HU", shown.run("return readout.textContent"))
    shown.run("document.querySelector('#label-list button[aria-pressed=true]').click()")


@needs_browser
def test_light_and_dark_follow_the_system_and_the_switch(shown: Browser) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    shown.prefer("light")
    light = shown.run(colour)
    shown.prefer("dark")
    dark = shown.run(colour)
    assert light != dark
    shown.click('#theme input[value="light"]')
    assert shown.run(colour) == light
    shown.prefer("light")
    shown.click('#theme input[value="dark"]')
    assert shown.run(colour) == dark
    shown.click('#theme input[value="auto"]')
    assert shown.run(colour) == light


@needs_browser
def test_the_3d_view_shows_or_says_why_not(shown: Browser) -> None:
    said = "const say = document.getElementById('solid-say'); return say.hidden ? 'shown' : /^No/.test(say.textContent) && say.textContent"
    words = shown.wait(said)
    assert words == "shown", words
    assert shown.run("return [...document.querySelectorAll('#solid-kind input')].map((each) => each.value)") == ["Labels", "Bones", "Skin"]
    assert shown.run("return gl.width > 100 && gl.getContext('webgl2') !== null")


@needs_browser
def test_every_sample_can_be_chosen(shown: Browser) -> None:
    shown.keys(AXIAL, "n")
    shown.wait("return document.documentElement.dataset.ready === '1'")
    assert shown.run("return document.querySelector('#quality article:not([hidden]) h3').textContent") == "Findings on failed"
    shown.click('#cards button[data-sample="2"]')
    shown.wait("return document.documentElement.dataset.ready === '2'")
    assert shown.run("return [...document.querySelectorAll('#tools > *')].map((each) => each.hidden)") == [True] * 4  # no image, no window
    assert pixels(shown)
    shown.click('#cards button[data-sample="3"]')  # a picture only
    shown.wait("return document.documentElement.dataset.ready === '3'")
    assert shown.run("return planes.hidden && document.querySelector('#still img').complete")
    assert "picture only" in shown.run("return still.textContent")
    shown.click('#cards button[data-sample="0"]')
    shown.wait("return document.documentElement.dataset.ready === '0'")


@needs_browser
def test_nothing_is_fetched_nothing_attacks_and_nothing_complains(shown: Browser) -> None:
    names = shown.run("return performance.getEntriesByType('resource').map((each) => each.name.slice(0, 80))")
    assert [name for name in names if not name.startswith(("data:", "blob:"))] == []
    assert shown.run("return window.attacked === undefined")
    assert [line for line in shown.complaints() if "GL Driver Message" not in line] == []  # what software rendering says of its speed


@needs_browser
def test_a_narrow_page_does_not_scroll_sideways(shown: Browser) -> None:
    for width in (420, 900):
        shown.size(width, 900)
        assert shown.run("return document.documentElement.scrollWidth") == width
    shown.size(1400, 950)


@needs_browser
def test_without_webgl_the_planes_work_and_the_3d_view_says_why(run: Path, tmp_path: Path) -> None:
    made = report(run, volumes=2).path
    with browser(tmp_path / "profile", "--disable-3d-apis") as session:
        session.size(1400, 950)
        session.open(made)
        session.wait("return document.getElementById('solid-say').textContent.startsWith('No 3D view: this browser offers no WebGL 2')")
        start = session.run(SLICE, "coronal")
        session.wheel('[data-plane="coronal"] canvas', 100)
        assert session.run(SLICE, "coronal") == start - 1
        assert session.complaints() == []
