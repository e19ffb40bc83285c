"""Presets, labels, models, plugins, info and doctor: the contract of their flags, JSON, text and exit codes."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import typer
from maisi_cli import anatomy, catalog, cli, devices, plugins, presets, quality, record
from maisi_cli.cli import doctor
from maisi_cli.geometry import Geometry

from .shell import Done

BODY = anatomy.BODY
GROUPS = ("presets", "labels", "models", "plugins")
COMMANDS = ("info", "doctor")


@pytest.fixture
def maisi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Return a function that runs a command line in an empty folder, away from the user's own settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    presets.read.cache_clear()  # it is keyed by paths, which are relative to the folder

    def run(line: str) -> Done:
        code = cli.run(shlex.split(line))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "bug in maisi" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


def save(path: Path, array: np.ndarray, *, spacing: float = 2.0, description: str = "") -> Path:
    image = nibabel.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1]))
    image.header["descrip"] = description.encode()
    nibabel.save(image, path)
    return path


def load(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def labels_with(*ids: int, size: int = 24) -> np.ndarray:
    """Return a label map with one slab of 2 x 4 x 4 voxels for each id, inside the body of `a_ct`."""
    array = np.zeros((size, size, size), np.uint8)
    for k, value in enumerate(ids):
        array[5 + 2 * k : 7 + 2 * k, 8:12, 8:12] = value
    return array


def a_ct(size: int = 24) -> np.ndarray:
    """Return air with a body of 14 x 16 x 16 voxels of soft tissue."""
    array = np.full((size, size, size), -1000, np.int16)
    array[4:18, 4:20, 4:20] = 40
    return array


def a_record(folder: Path) -> Path:
    image = save(folder / "sample_image.nii.gz", a_ct(), description="SYNTHETIC maisi")
    verdict = quality.Verdict(findings=())
    made = record.build(
        id="sample", index=0, seed=7, attempt=1, derived_seed=11, settings={"seed": 7, "steps": 20, "count": 1},
        origins={"seed": "command line", "steps": "environment", "count": "default"},
        model={"name": "nano-ct", "licence": "Apache-2.0", "weights": []}, modality="ct",
        geometry=Geometry(size=(24, 24, 24), spacing=(2, 2, 2)), mask=None, verdict=verdict, outputs={"image": image},
        seconds={"save": 0.5},
    )  # fmt: skip
    return record.write(folder / "sample_record.json", made)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with the files that the examples name."""
    to = {anatomy.maisi().name_of(value): key for key, value in anatomy.remap_table("totalsegmentator").pairs.items()}
    seg = labels_with(to["liver"], to["spleen"])
    save(tmp_path / "seg.nii.gz", seg)
    save(tmp_path / "organs.nii.gz", seg)
    save(tmp_path / "seg_body.nii.gz", np.where((seg == 0) & (a_ct() > -500), BODY, seg).astype(np.uint8))
    save(tmp_path / "label.nii.gz", np.where(a_ct() > -500, BODY, 0).astype(np.uint8) + labels_with(0))
    save(tmp_path / "ct.nii.gz", a_ct())
    a_record(tmp_path)
    text = 'schema = "maisi.preset/1"\nkind = "region"\nsummary = "mine"\nextends = "abdomen"\n'
    (tmp_path / "my-liver.toml").write_text(text)
    return tmp_path


def examples() -> list[tuple[str, str]]:
    """Return (command, example line) for every command of this module, from the end of its help."""
    root = typer.main.get_command(cli.build())
    found = []
    for name in (*GROUPS, *COMMANDS):
        if name == "models":  # these need a hub: test_cli_models.py
            continue
        command = root.commands[name]  # type: ignore[attr-defined]
        for path, each in [(f"{name} {sub}", it) for sub, it in getattr(command, "commands", {}).items()] or [(name, command)]:
            lines = [line.strip() for line in (each.epilog or "").splitlines()]
            mine = [line for line in lines if line.startswith("maisi ")]
            assert 2 <= len(mine) <= 3, path
            assert all(line.startswith(f"maisi {path}") for line in mine), path
            found += [(path, line) for line in mine]
    return found


@pytest.mark.parametrize(("command", "line"), examples())
def test_the_examples_of_the_help_run(command, line, maisi, files):
    if command == "labels add-body":
        (files / "seg_body.nii.gz").unlink()
    done = maisi(line.removeprefix("maisi "))
    assert done.out
    if command == "doctor":
        assert done.code in (0, 1)
    else:
        assert done.code == 0, done.err
    if "--json" in line:
        assert done.json["schema"].startswith("maisi.")


ANSWERS = {
    "presets list": ("maisi.presets/1", {"presets"}),
    "presets show abdomen": (
        "maisi.preset-show/1",
        {"name", "kind", "summary", "path", "modality", "region", "size", "spacing_mm", "fov_mm", "share_percent",
         "scans", "values", "evidence"},
    ),
    "presets validate abdomen": ("maisi.presets-validate/1", {"passed", "files"}),
    "presets new mine --from abdomen": ("maisi.presets-new/1", {"name", "kind", "extends", "path"}),
    "labels list": ("maisi.labels/1", {"vocabulary", "labels"}),
    "labels list --sets": ("maisi.label-sets/1", {"sets"}),
    "labels list --modalities": ("maisi.modalities/1", {"modalities"}),
    "labels show liver": (
        "maisi.label/1",
        {"id", "name", "group", "regions", "color", "raw", "host", "host_name", "owner", "partners"},
    ),
    "labels show totalsegmentator": ("maisi.label-set/1", {"name", "summary", "labels"}),
    "labels map seg.nii.gz out.nii.gz --from totalsegmentator": (
        "maisi.labels-map/1",
        {"input", "output", "from", "to", "mapped", "without_partner", "merged", "ambiguous", "body_envelope"},
    ),
    "labels check label.nii.gz": ("maisi.labels-check/1", {"path", "vocabulary", "passed", "findings", "labels"}),
    "labels add-body seg.nii.gz out.nii.gz --ct ct.nii.gz": (
        "maisi.labels-add-body/1",
        {"input", "ct", "output", "voxels"},
    ),
    "models list": ("maisi.models/1", {"models"}),
    "models show nano-ct": (
        "maisi.model-show/1",
        {"name", "summary", "path", "bundled", "installed", "modality", "modalities", "modes", "licence", "limits",
         "max_volume", "scheduler", "defaults", "networks", "weights"},
    ),
    "models path nano-ct": ("maisi.model-path/1", {"name", "installed", "files"}),
    "plugins list": ("maisi.plugins/1", {"plugins"}),
    "info my-liver.toml": ("maisi.info/1", {"path", "kind", "preset"}),
    "info sample_record.json": ("maisi.info/1", {"path", "kind", "record"}),
    "doctor": ("maisi.doctor/1", {"ok", "checks", "problems"}),
}  # fmt: skip


@pytest.mark.parametrize("line", ANSWERS)
def test_json_is_one_document_with_its_schema_and_keys(line, maisi, files):
    schema, keys = ANSWERS[line]
    done = maisi(f"{line} --json")
    assert done.json["schema"] == schema
    assert set(done.json) == {"schema", *keys}


def test_every_command_answers_in_json_and_quietly():
    root = typer.main.get_command(cli.build())
    for name in GROUPS:
        for sub, command in root.commands[name].commands.items():  # type: ignore[attr-defined]
            flags = {flag for option in command.params for flag in option.opts}
            assert {"--json", "--quiet", "-q", "--verbose"} <= flags, (name, sub)


WRONG = [
    ("presets list --kind reigon", "did you mean 'region'"),
    ("presets list --modality mri-t3", "did you mean 'mri-t"),
    ("presets list --kind gpu --modality ct", "gpu presets have no modality"),
    ("presets show chest-abdomn", "did you mean 'chest-abdomen'"),
    ("presets show mine.toml", "there is no preset file mine.toml"),
    ("presets validate nothing.toml", "there is no preset file nothing.toml"),
    ("presets validate chset", "did you mean 'chest'"),
    ("presets new --from abdomen", "missing argument"),
    ("presets new mine", "missing option '--from'"),
    ("presets new mine --from abdomn", "did you mean 'abdomen'"),
    ("presets new 'My Liver' --from abdomen", "is not a name for a preset"),
    ("presets new ../mine --from abdomen", "is not a name for a preset"),
    ("presets new chest --from abdomen", "the name chest is taken"),
    ("presets new abdomen --from abdomen", "the name abdomen is taken"),
    ("presets new mine --from my-liver.toml", "--from takes the name of a preset"),
    ("presets lst", "did you mean 'list'"),
    ("preset list", "did you mean 'presets'"),
    ("labels list --group organs", "did you mean 'organ'"),
    ("labels list --region thigh", "use head, chest, abdomen, lower"),
    ("labels list --sets --modalities", "exclude each other"),
    ("labels list --sets --group organ", "exclude each other"),
    ("labels show livr", "did you mean 'liver'"),
    ("labels show totalsegmentor", "did you mean 'totalsegmentator'"),
    ("labels show 199", "there is no label 199"),
    ("labels show table.toml", "the remap table table.toml does not exist"),
    ("labels map seg.nii.gz out.nii.gz --from totalsegmentater", "did you mean 'totalsegmentator'"),
    ("labels map seg.nii.gz out.nii.gz", "missing option '--from'"),
    ("labels map seg.nii.gz out.nii.gz --from maisi", "are both maisi"),
    ("labels map seg.nii.gz out.nii.gz --from raw125 --to totalsegmentator", "map in two steps"),
    ("labels map nothing.nii.gz out.nii.gz --from totalsegmentator", "does not exist"),
    ("labels map ct.nii.gz out.nii.gz --from totalsegmentator", "negative label"),
    ("labels map seg.nii.gz out.mha --from totalsegmentator", "is not named .nii.gz or .nii"),
    ("labels map seg.nii.gz label.nii.gz --from totalsegmentator", "already exists"),
    ("labels check nothing.nii.gz", "does not exist"),
    ("labels check ct.nii.gz", "negative label"),
    ("labels check seg.nii.gz --labels total", "did you mean 'totalsegmentator'"),
    ("labels add-body seg.nii.gz out.nii.gz", "missing option '--ct'"),
    ("labels add-body seg.nii.gz out.nii.gz --ct nothing.nii.gz", "does not exist"),
    ("labels add-body seg.nii.gz out.nii.gz --ct other.nii.gz", "different grids"),
    ("labels add-body seg.nii.gz label.nii.gz --ct ct.nii.gz", "already exists"),
    ("models show rflow-tc", "did you mean 'rflow-ct'"),
    ("models show mine.toml", "there is no model file mine.toml"),
    ("models show nano-ct --toml --json", "exclude each other"),
    ("models path nano", "did you mean 'nano-ct'"),
    ("info nothing.nii.gz", "does not exist"),
    ("info .", "is a folder"),
    ("info notes.txt", "not a file that info reads"),
    ("info notes.toml", "info reads the schemas maisi.model/1 and maisi.preset/1"),
    ("info binary.toml", "cannot be read"),
    ("info binary.nii.gz", "is not a NIfTI file"),
    ("info list.json", "has no schema"),
    ("info seg.nii.gz --labels totalsegmentatr", "did you mean 'totalsegmentator'"),
    ("docter", "did you mean 'doctor'"),
    ("labels list --grop organ", "--group"),
]


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_wrong_use_says_what_is_wrong_and_writes_nothing(line, says, maisi, files):
    save(files / "other.nii.gz", a_ct(), spacing=3)
    (files / "notes.txt").write_text("notes")
    (files / "notes.toml").write_text("a = 1")
    (files / "list.json").write_text("{}")
    for name in ("binary.toml", "binary.nii.gz"):
        (files / name).write_bytes(b"\xff\xfe\x00\x01")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    done = maisi(line)
    assert (done.code, done.out) == (2, "")
    assert says.casefold() in done.err.casefold()
    assert done.err.startswith("error: ")
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


# --- presets --------------------------------------------------------------------------------


def test_presets_list_names_every_preset_with_its_volume(maisi):
    text, rows = maisi("presets list"), maisi("presets list --json").json["presets"]
    assert text.first_column == [row["name"] for row in rows]
    assert {row["kind"] for row in rows} == {"region", "gpu", "train"}
    row = next(row for row in rows if row["name"] == "chest-abdomen")
    assert (row["size"], row["spacing_mm"], row["share_percent"]) == (
        [512, 512, 128],
        [0.781, 0.781, 2.981],
        58.55,
    )
    assert row["fov_mm"] == pytest.approx([399.872, 399.872, 381.568])
    assert all(row["size"] is None for row in rows if row["kind"] != "region")


def test_presets_list_narrows_to_a_kind_or_a_modality(maisi):
    def names(line: str) -> set[str]:
        return {row["name"] for row in maisi(f"presets list {line} --json").json["presets"]}

    assert names("--kind gpu") == {each.name for each in presets.presets("gpu")}
    mr = {each.name: each.modality for each in presets.presets("region") if each.modality != "ct"}
    assert names("--modality mri") == set(mr)
    assert names("--modality mr_t2") == {name for name, modality in mr.items() if modality == "mri-t2"}
    none = maisi("presets list --modality ct-contrast")
    assert (none.code, none.first_column) == (0, [])
    assert "no preset of modality ct-contrast" in none.err


@pytest.mark.parametrize("kind", presets.FOLDERS)
def test_presets_show_prints_toml_that_reads_back_to_the_same_values(kind, maisi):
    for preset in presets.presets(kind):
        text, about = (
            maisi(f"presets show {preset.name}").out,
            maisi(f"presets show {preset.name} --json").json,
        )
        assert text.startswith(f"# {preset.path}\n")
        data = tomllib.loads(text)
        assert data["kind"] == about["kind"] == kind
        assert data.get("evidence", {}) == about["evidence"] == preset.evidence
        assert {key: data[key] for key in about["values"]} == about["values"] == preset.values


def uncommented(text: str) -> str:
    return "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())


@pytest.mark.parametrize("kind", presets.FOLDERS)
def test_a_new_preset_extends_and_its_comments_are_the_values(kind, maisi, tmp_path):
    for preset in presets.presets(kind):
        done = maisi(f"presets new my-{preset.name} --from {preset.name}")
        path = Path("maisi-presets") / f"my-{preset.name}.toml"
        assert (done.code, done.out) == (0, f"{path}\n")
        made = presets.preset(f"my-{preset.name}", kind)  # found by name in this folder
        assert made.values == preset.values
        assert made.evidence == {}
        assert maisi(f"presets validate {path}").out == f"pass  {path}\n"
        changed = tmp_path / "other" / path.name
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(uncommented(path.read_text()))
        alone = tomllib.loads(changed.read_text())
        for table in set(alone) & set(preset.values):
            assert alone[table] == preset.values[table]
        assert set(preset.values) - set(alone) <= {"measured"}


def test_a_changed_value_of_a_new_preset_holds(maisi, tmp_path):
    path = Path(maisi("presets new my-liver --from abdomen --out here").out.strip())
    path.write_text(path.read_text().replace("# size = [512, 512, 128]", "size = [256, 256, 128]"))
    shown = tomllib.loads(maisi(f"presets show {path}").out)
    assert shown["volume"]["size"] == [256, 256, 128]
    assert shown["volume"]["spacing"] == [0.723, 0.723, 1.182]
    assert maisi(f"presets validate {path}").code == 0


def test_presets_new_never_writes_over_a_file_unless_forced(maisi, tmp_path):
    path = tmp_path / "maisi-presets" / "my-liver.toml"
    assert maisi("presets new my-liver --from abdomen").code == 0
    path.write_text(path.read_text() + "# mine\n")
    mine = path.read_text()
    assert maisi("presets new my-liver --from abdomen").code == 2
    assert path.read_text() == mine
    assert maisi("presets new my-liver --from abdomen --force -q").err == ""
    assert path.read_text() == mine.removesuffix("# mine\n")
    assert [each.name for each in path.parent.iterdir()] == ["my-liver.toml"]


HEAD = 'schema = "maisi.preset/1"\nkind = "region"\n'
VOLUME = "[volume]\nsize = [512, 512, 128]\nspacing = [1, 1, 2]\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD + VOLUME + "spacin = 1\n", "unknown key volume.spacin, did you mean volume.spacing?"),
        (HEAD + VOLUME + "[anatmy]\n", "unknown key anatmy, did you mean anatomy?"),
        (HEAD + VOLUME + "[execution]\nwindow = 1\n", "unknown key execution"),
        (HEAD + VOLUME + '[anatomy]\nregions = ["chst"]\n', "there is no body region 'chst'"),
        (HEAD + VOLUME + 'modality = "ctt"\n', "there is no modality named 'ctt'"),
        (HEAD + VOLUME + 'model = "rflow-tc"\n', "did you mean 'rflow-ct'"),
        (HEAD + "[volume]\nsize = [512, 512, 128]\n", "[volume] has no spacing"),
        (HEAD + "[volume]\nsize = [0, 512, 128]\nspacing = 1\n", "positive"),
        (HEAD + "volume = 3\n", "volume is 3, not a table [volume]"),
        (HEAD + 'extends = "chset"\n', "did you mean 'chest'"),
        (HEAD.replace("region", "regoin"), "kind is 'regoin', not region, gpu, train"),
        (VOLUME, "schema is None"),
        ("a = ", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
    ],
)
def test_presets_validate_finds(text, problem, maisi, tmp_path):
    (tmp_path / "mine.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    plain, data = maisi("presets validate mine.toml chest"), maisi("presets validate mine.toml chest --json")
    assert (plain.code, data.code, data.json["passed"]) == (1, 1, False)
    mine, chest = data.json["files"]
    assert any(problem in each for each in mine["problems"]), mine["problems"]
    assert (mine["passed"], chest["passed"], chest["problems"]) == (False, True, [])
    lines = plain.out.splitlines()
    assert lines[0] == "FAIL  mine.toml"
    assert [line.strip() for line in lines[1:-1]] == mine["problems"]
    assert lines[-1] == f"pass  {presets.preset('chest', 'region').path}"


def test_presets_validate_shows_every_problem_and_shipped_ones_have_none(maisi, tmp_path):
    (tmp_path / "mine.toml").write_text(HEAD + '[volume]\nsize = [1, 1, 1]\nmodl = "a"\n[anatmy]\n[anatomy]\nregions = ["x"]\n')
    (file,) = maisi("presets validate mine.toml --json").json["files"]
    assert len(file["problems"]) == 4
    names = " ".join(each.name for kind in presets.FOLDERS for each in presets.presets(kind))
    assert maisi(f"presets validate {names}").code == 0


# --- labels ---------------------------------------------------------------------------------


def test_labels_list_is_the_vocabulary(maisi):
    rows = maisi("labels list --json").json["labels"]
    assert [row["id"] for row in rows if row["owner"] == "maisi"] == [*range(1, 133), BODY]
    assert maisi("labels list").first_column == [str(row["id"]) for row in rows]
    organs = maisi("labels list --group organ --region abdomen --json").json["labels"]
    assert "liver" in {row["name"] for row in organs}
    assert all(row["group"] == "organ" and "abdomen" in row["regions"] for row in organs)
    assert [row["id"] for row in organs] == [row["id"] for row in rows if row["group"] == "organ" and "abdomen" in row["regions"]]


def test_label_sets_and_modalities_are_listed(maisi):
    sets = maisi("labels list --sets --json").json["sets"]
    total = next(row for row in sets if row["name"] == "totalsegmentator")
    assert (total["labels"], total["mapped"]) == (117, 117)
    assert maisi("labels list --sets").first_column == [row["name"] for row in sets] == ["maisi", *anatomy.remaps()]
    modalities = maisi("labels list --modalities --json").json["modalities"]
    assert maisi("labels list --modalities").first_column == [row["name"] for row in modalities]
    ct = next(row for row in modalities if row["name"] == "ct")
    assert ct["id"] == 1
    assert {"nano-ct", "rflow-ct"} <= set(ct["models"])


def test_labels_show_gives_partners_and_hosts(maisi):
    liver = maisi("labels show liver --json").json
    assert (liver["id"], liver["partners"]["totalsegmentator"]) == (1, [{"id": 5, "name": "liver"}])
    tumor = maisi("labels show 'Liver Tumor' --json").json
    assert (tumor["id"], tumor["name"], tumor["host_name"]) == (26, "hepatic tumor", "liver")
    assert maisi("labels show 26").out == maisi("labels show hepatic_tumor").out
    table = maisi("labels show totalsegmentator --json").json["labels"]
    assert {row["id"]: row["maisi"]["id"] for row in table} == anatomy.remap_table("totalsegmentator").pairs
    assert maisi("labels show totalsegmentator").first_column == [str(row["id"]) for row in table]


REMAP = """
schema = "maisi.remap/1"
name = "mine"
[[label]]
id = 1
name = "hepar"
maisi = "liver"
[[label]]
id = 2
name = "left lobe"
maisi = "liver"
[[label]]
id = 3
name = "gadget"
"""


JAWS = """
schema = "maisi.remap/1"
name = "jaws"
target = "maisi"
label = [{id = 1, name = "liver", maisi = "liver"}, {id = 200, name = "left mandible"}]
"""


def test_labels_map_maps_each_voxel_and_names_what_has_no_partner(maisi, tmp_path):
    (tmp_path / "mine.toml").write_text(REMAP)
    before = labels_with(1, 2, 3, 77)
    save(tmp_path / "in.nii.gz", before, description="from a scanner")
    done = maisi("labels map in.nii.gz out.nii.gz --from mine.toml")
    assert (done.code, done.out) == (0, "out.nii.gz\n")
    after = load(tmp_path / "out.nii.gz")
    wanted = np.select([(before == 1) | (before == 2), before > 0], [1, BODY], 0)
    np.testing.assert_array_equal(after, wanted)
    assert after.dtype == np.uint8
    assert "warning: no partner in maisi, now body (200): 3 gadget, 77 id 77" in done.err
    assert "1, 2 became 1 liver: this cannot be mapped back" in done.err
    report = maisi("labels map in.nii.gz out2.nii.gz --from mine.toml --json").json
    assert [(row["id"], row["to_id"], row["to_name"]) for row in report["mapped"]] == [
        (1, 1, "liver"),
        (2, 1, "liver"),
    ]
    assert [(row["id"], row["name"], row["became"]) for row in report["without_partner"]] == [
        (3, "gadget", BODY), (77, "id 77", BODY),
    ]  # fmt: skip
    assert report["merged"] == [{"to_id": 1, "to_name": "liver", "ids": [1, 2]}]
    assert report["ambiguous"] == []
    back = maisi("labels map out.nii.gz back.nii.gz --from maisi --to mine.toml")
    assert "1 liver became 1 hepar, the lowest of 1, 2 in mine.toml" in back.err
    (row,) = maisi("labels map out.nii.gz back2.nii.gz --from maisi --to mine.toml --json").json["ambiguous"]
    assert (row["id"], row["to_id"], row["to_ids"]) == (1, 1, [1, 2])
    assert set(np.unique(load(tmp_path / "back.nii.gz"))) == {0, 1}
    header = nibabel.load(tmp_path / "out.nii.gz").header
    assert header["descrip"].tobytes().startswith(b"maisi ")  # a real mask does not become synthetic


def test_labels_map_there_and_back_is_the_same(maisi, tmp_path):
    remap = anatomy.remap_table("totalsegmentator")
    unique = [key for key, value in remap.pairs.items() if list(remap.pairs.values()).count(value) == 1]
    before = np.zeros((8, 8, 8), np.uint8)
    before.ravel()[: len(unique)] = unique
    save(tmp_path / "ts.nii.gz", before, description="SYNTHETIC maisi 0")
    there = maisi("labels map ts.nii.gz maisi.nii.gz --from totalsegmentator --json").json
    assert {row["id"]: row["to_id"] for row in there["mapped"]} == {key: remap.pairs[key] for key in unique}
    assert there["without_partner"] == []
    back = maisi("labels map maisi.nii.gz back.nii.gz --from maisi --to totalsegmentator --json").json
    assert len(back["mapped"]) == len(unique)
    np.testing.assert_array_equal(load(tmp_path / "back.nii.gz"), before)
    for row in back["mapped"]:
        assert row["to_name"] == remap.names[row["to_id"]]
    text = nibabel.load(tmp_path / "back.nii.gz").header["descrip"].tobytes()
    assert text.startswith(b"SYNTHETIC maisi 0")


def test_labels_map_keeps_the_envelope_and_says_where_it_goes(maisi, files):
    done = maisi("labels map seg_body.nii.gz out.nii.gz --from totalsegmentator --json").json
    assert done["without_partner"] == []
    assert (load(files / "out.nii.gz") == BODY).sum() == (load(files / "seg_body.nii.gz") == BODY).sum() > 0
    out = maisi("labels map out.nii.gz ts.nii.gz --from maisi --to totalsegmentator")
    assert "warning: no partner in totalsegmentator, now background: 200 body" in out.err
    assert BODY not in load(files / "ts.nii.gz")


def test_labels_map_replaces_a_file_only_when_forced(maisi, files):
    assert maisi("labels map seg.nii.gz seg.nii.gz --from totalsegmentator").code == 2
    before = load(files / "seg.nii.gz")
    assert maisi("labels map seg.nii.gz seg.nii.gz --from totalsegmentator --force -q").err == ""
    assert set(np.unique(load(files / "seg.nii.gz"))) == {0, 1, 3} != set(np.unique(before))
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("array", "labels", "code", "found"),
    [
        (labels_with(1, 3, BODY), "maisi", 0, []),
        (labels_with(1, 3), "maisi", 1, ["no-body"]),
        (labels_with(1, 140, BODY), "maisi", 1, ["unknown-id"]),
        (labels_with(1, 2, BODY), "maisi", 0, ["free-id", "other-set"]),
        (labels_with(1, 2, 3, 5), "maisi", 1, ["free-id", "other-set", "no-body"]),  # a map of TotalSegmentator
        (labels_with(1, 3, BODY).astype(np.float32), "maisi", 0, ["stored-type"]),
        (labels_with(1, 140).astype(np.float64), "maisi", 1, ["stored-type", "unknown-id", "no-body"]),
        (labels_with(1, 132), "nv-segment-ct", 1, ["no-body"]),
        (labels_with(1, 2, 129, BODY), "nv-segment-ct", 0, ["no-partner"]),
        (labels_with(1, 124), "raw125", 0, []),
        (labels_with(1, 99, BODY), "jaws.toml", 1, ["unknown-id", "no-partner", "no-body"]),  # there 200 is a left mandible
        (labels_with(5, 117, BODY), "totalsegmentator", 0, []),
        (labels_with(5, 118), "totalsegmentator", 1, ["unknown-id", "no-body"]),
        (labels_with(1, 3, BODY), "mine.toml", 0, ["no-partner"]),
        (labels_with(), "maisi", 1, ["empty"]),
    ],
)
def test_labels_check(array, labels, code, found, maisi, tmp_path):
    (tmp_path / "mine.toml").write_text(REMAP)
    (tmp_path / "jaws.toml").write_text(JAWS)
    save(tmp_path / "a.nii.gz", array)
    text, data = (maisi(f"labels check a.nii.gz --labels {labels} {flag}") for flag in ("", "--json"))
    assert (text.code, data.code, data.json["passed"]) == (code, code, code == 0)
    assert [finding["check"] for finding in data.json["findings"]] == found
    assert [row["id"] for row in data.json["labels"]] == [value for value in np.unique(array) if value]
    assert all(row["ml"] == pytest.approx(row["voxels"] * 8 / 1000) for row in data.json["labels"])
    assert text.out.startswith("pass" if code == 0 else "FAIL")
    for finding, line in zip(data.json["findings"], text.out.splitlines()[1:], strict=True):
        assert finding["text"] in line
        assert (finding["level"] == "note") is line.strip().startswith("note: ")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (labels_with(1).astype(np.int16) * 300, "holds label 300; labels lie in 0..255"),
        (labels_with(1) - np.float32(0.5), "values that are not whole: it is not a label map"),
    ],
)
def test_labels_check_refuses_what_is_no_label_map(array, says, maisi, tmp_path):
    save(tmp_path / "a.nii.gz", array)
    done = maisi("labels check a.nii.gz")
    assert (done.code, says in done.err, done.out) == (2, True, "")


def test_what_lost_its_partner_is_no_envelope(maisi, files):
    (files / "mine.toml").write_text(REMAP)
    save(files / "odd.nii.gz", labels_with(1, 3))
    done = maisi("labels map odd.nii.gz out.nii.gz --from mine.toml")
    assert "no body envelope (label 200) yet; add it:  maisi labels add-body out.nii.gz" in done.err
    assert maisi("labels map odd.nii.gz out2.nii.gz --from mine.toml --json").json["body_envelope"] is False
    assert BODY in load(files / "out.nii.gz")
    from maisi_cli.errors import UsageError
    from maisi_cli.masks import load_mask

    with pytest.raises(UsageError, match="no body envelope"):
        load_mask(Path("odd.nii.gz"), labels="mine.toml")
    save(files / "whole.nii.gz", labels_with(1, 3, BODY))
    assert BODY in load_mask(Path("whole.nii.gz"), labels="mine.toml").ids()
    done = maisi("labels map whole.nii.gz out3.nii.gz --from mine.toml --json").json
    assert (done["body_envelope"], [row["id"] for row in done["without_partner"]]) == (True, [3])


def test_labels_of_nv_segment_need_only_the_body(maisi, files):
    save(files / "nv.nii.gz", labels_with(1, 3, 132))
    check = maisi("labels check nv.nii.gz --labels nv-segment-ct")
    assert (check.code, "maisi labels add-body nv.nii.gz" in check.out) == (1, True)
    there = maisi("labels map nv.nii.gz mapped.nii.gz --from nv-segment-ct --json").json
    assert (there["without_partner"], there["merged"], there["body_envelope"]) == ([], [], False)
    np.testing.assert_array_equal(load(files / "mapped.nii.gz"), load(files / "nv.nii.gz"))
    maisi("labels add-body mapped.nii.gz body.nii.gz --ct ct.nii.gz")
    back = maisi("labels map body.nii.gz back.nii.gz --from maisi --to nv-segment-ct --json").json
    assert [(row["id"], row["became"]) for row in back["without_partner"]] == [(BODY, 0)]
    np.testing.assert_array_equal(load(files / "back.nii.gz"), load(files / "nv.nii.gz"))


def test_the_command_that_check_and_generate_name_adds_the_body(maisi, files):
    hint = maisi("labels check seg.nii.gz --labels totalsegmentator").out.split("add it:")[1].strip()
    line = hint.removeprefix("maisi ").replace("CT.nii.gz", "ct.nii.gz")
    assert maisi(line).code == 0
    assert maisi("labels check NEW.nii.gz --labels totalsegmentator").code == 0
    from maisi_cli.errors import UsageError
    from maisi_cli.masks import load_mask

    with pytest.raises(UsageError) as refused:
        load_mask(Path("seg.nii.gz"), labels="totalsegmentator")
    named = (refused.value.hint or "").split(", or")[0].removeprefix("maisi ")
    assert maisi(named.replace("CT.nii.gz", "ct.nii.gz") + " --force").code == 0


def test_add_body_fills_exactly_the_body(maisi, files):
    seg = load(files / "seg.nii.gz")
    done = maisi("labels add-body seg.nii.gz out.nii.gz --ct ct.nii.gz")
    assert (done.code, done.out) == (0, "out.nii.gz\n")
    wanted = np.where(seg > 0, seg, np.where(a_ct() > -800, BODY, 0))
    np.testing.assert_array_equal(load(files / "out.nii.gz"), wanted)
    voxels = maisi("labels add-body seg.nii.gz out2.nii.gz --ct ct.nii.gz --json").json["voxels"]
    organ = int((seg > 0).sum())
    body = 14 * 16 * 16
    assert voxels == {"volume": 24**3, "body": body, "envelope": body - organ, "added": body - organ}


def test_add_body_keeps_unlabelled_lungs_only_when_told(maisi, tmp_path):
    ct = a_ct()
    ct[6:16, 6:18, 13:18] = -850  # lungs inside the body
    save(tmp_path / "ct.nii.gz", ct)
    save(tmp_path / "seg.nii.gz", labels_with(5)[:, :, :])
    maisi("labels add-body seg.nii.gz a.nii.gz --ct ct.nii.gz")
    maisi("labels add-body seg.nii.gz b.nii.gz --ct ct.nii.gz --no-lung-labels")
    lungs = ct == -850
    assert (load(tmp_path / "a.nii.gz")[lungs] == 0).all()
    assert (load(tmp_path / "b.nii.gz")[lungs] == BODY).all()


# --- models, plugins ------------------------------------------------------------------------


def test_models_list_and_show_agree_with_the_catalogue(maisi):
    rows = maisi("models list --json").json["models"]
    assert maisi("models list").first_column == [row["name"] for row in rows] == [spec.name for spec in catalog.models()]
    for row in rows:
        about = maisi(f"models show {row['name']} --json").json
        assert {key: about[key] for key in row} == row
        text = maisi(f"models show {row['name']}").out
        assert row["licence"]["name"] in text
        assert ("commercial use allowed" in text) is row["licence"]["commercial"]
        for weight in about["weights"]:
            assert weight["file"] in text
        spec = catalog.model(row["name"])
        assert tomllib.loads(maisi(f"models show {row['name']} --toml").out) == tomllib.loads(spec.path.read_text())
    assert next(row for row in rows if row["name"] == "rflow-mr")["licence"]["commercial"] is False


def test_a_model_is_installed_when_its_files_lie_where_path_says(maisi):
    assert maisi("models path rflow-ct --json").json["installed"] is False
    said = maisi("models path rflow-ct")
    assert "files are not there: vae, unet, controlnet" in said.err
    files = maisi("models path rflow-ct --json").json["files"]
    assert said.out.splitlines() == [row["file"] for row in files]
    for row in files:
        Path(row["file"]).parent.mkdir(parents=True, exist_ok=True)
        Path(row["file"]).touch()
    done = maisi("models path rflow-ct")
    assert done.err == ""
    rows = {row["name"]: row["installed"] for row in maisi("models list --json").json["models"]}
    assert rows["rflow-ct"] is True
    assert rows["rflow-mr"] is False


def test_a_model_file_of_ones_own_is_shown(maisi, tmp_path):
    text = maisi("models show nano-ct --toml").out.replace('name = "nano-ct"', 'name = "mine"')
    (tmp_path / "mine.toml").write_text(text)
    assert maisi("models show mine.toml --json").json["name"] == "mine"
    shown = maisi("info mine.toml --json").json
    assert (shown["kind"], shown["model"]["name"]) == ("model", "mine")
    assert maisi("info mine.toml").out == maisi("models show mine.toml").out
    (tmp_path / "wrong.toml").write_text(text.replace("[limits]", "[limit]"))
    wrong = maisi("models show wrong.toml")
    assert (wrong.code, "did you mean 'limits'" in wrong.err) == (2, True)


def test_plugins_list_says_what_each_adds_or_why_it_was_skipped(maisi, monkeypatch):
    loaded = plugins.load("not-installed")
    monkeypatch.setattr(plugins, "plugins", lambda: loaded)
    done, rows = maisi("plugins list"), maisi("plugins list --json").json["plugins"]
    assert done.code == 0
    assert done.first_column == ["defaults", "not-installed"] == [row["name"] for row in rows]
    assert "scheduler rflow" in rows[0]["adds"]
    assert rows[1]["problem"] == "named in MAISI_LOAD_PLUGINS but not installed"
    assert rows[1]["problem"] in done.out
    (check,) = [each for each in maisi("doctor --json").json["checks"] if each["name"] == "plugin not-installed"]
    assert (check["ok"], check["value"]) == (False, rows[1]["problem"])


# --- info -----------------------------------------------------------------------------------


def test_info_of_a_label_map(maisi, files):
    text, about = (
        maisi("info seg_body.nii.gz --labels totalsegmentator"),
        maisi("info label.nii.gz --json").json,
    )
    assert (about["kind"], about["body_envelope"], about["size"], about["spacing_mm"]) == (
        "label", True, [24, 24, 24], [2, 2, 2],
    )  # fmt: skip
    assert about["labels"] == [{"id": BODY, "name": "body", "voxels": 14 * 256, "ml": pytest.approx(14 * 256 * 0.008)}]
    assert "  5  liver" in text.out
    assert "body (200)   yes" in text.out


def test_info_of_an_image_with_its_record(maisi, files):
    text, about = maisi("info sample_image.nii.gz"), maisi("info sample_image.nii.gz --json").json
    assert (about["kind"], about["synthetic"], about["record"]) == ("image", True, "sample_record.json")
    assert (about["made"]["seed"], about["made"]["model"]["name"]) == (7, "nano-ct")
    assert about["intensity"]["min"] == -1000
    for fact in (
        "int16, synthetic",
        "24x24x24 voxels",
        "48x48x48 mm",
        "seed         7",
        "model        nano-ct",
    ):
        assert fact in text.out
    (files / "sample_record.json").write_text("{")
    broken = maisi("info sample_image.nii.gz")
    assert (broken.code, "warning: sample_record.json is not JSON" in broken.err) == (0, True)
    assert "is not JSON" in maisi("info sample_image.nii.gz --json").json["record_problem"]


def test_info_of_an_image_without_a_record(maisi, files):
    about = maisi("info ct.nii.gz --json").json
    assert (about["record"], about["made"], about["synthetic"]) == (None, None, False)
    assert "record" not in maisi("info ct.nii.gz").out


def test_info_of_a_record_says_what_changed(maisi, files):
    text, about = maisi("info sample_record.json"), maisi("info sample_record.json --json").json
    assert about["record"]["changed_outputs"] == []
    assert [line.split() for line in text.out.splitlines()[-2:]] == [
        ["seed", "7", "command", "line"], ["steps", "20", "environment"],
    ]  # fmt: skip
    assert text.err == ""
    (files / "sample_image.nii.gz").write_bytes(b"other")
    assert maisi("info sample_record.json --json").json["record"]["changed_outputs"] == ["sample_image.nii.gz"]
    assert "warning: sample_image.nii.gz is missing, or is not the file" in maisi("info sample_record.json").err


def test_info_of_a_preset(maisi, files):
    assert maisi("info my-liver.toml").out == maisi("presets show my-liver.toml").out
    about = maisi("info my-liver.toml --json").json
    assert (about["kind"], about["preset"]["summary"]) == ("preset", "mine")
    assert about["preset"]["values"] == presets.preset("abdomen", "region").values


# --- doctor ---------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that weights are there and that there is no GPU, so that only what a test breaks is a problem."""
    monkeypatch.setattr(catalog.ModelSpec, "installed", lambda self, mode="paired": True)
    monkeypatch.setattr(devices, "detect", lambda: devices.Gpu(name="processor", kind="cpu", memory_gib=8.0))


def problems(done: Done) -> list[str]:
    data = done.json
    assert done.code == (1 if data["problems"] else 0)
    assert data["ok"] is not bool(data["problems"])
    assert data["problems"] == [check["name"] for check in data["checks"] if not check["ok"]]
    assert all(set(check) == {"name", "value", "ok", "hint"} for check in data["checks"])
    assert all((check["hint"] is None) or not check["ok"] for check in data["checks"])
    return data["problems"]


def test_doctor_finds_nothing_wrong_where_nothing_is(maisi, healthy, tmp_path):
    assert problems(maisi("doctor --json")) == []
    done = maisi("doctor")
    assert (done.code, done.err) == (0, "no problem found\n")
    checks = {check["name"]: check["value"] for check in maisi("doctor --json").json["checks"]}
    assert {
        "maisi",
        "python",
        "torch",
        "monai",
        "gpu",
        "memory",
        "disk",
        "environment",
        "user config",
    } <= set(checks)
    assert checks["weights folder"] == str(tmp_path / "home")
    assert "MAISI_HOME" in checks["environment"]


def test_doctor_text_and_json_agree(maisi):
    text, data = maisi("doctor"), maisi("doctor --json")
    assert text.code == data.code
    rows = text.out.splitlines()[1:]
    for check, line in zip(data.json["checks"], rows, strict=True):
        assert line.startswith("ok" if check["ok"] else "PROBLEM")
        assert check["name"] in line
        if check["name"] != "disk":
            assert check["value"] in line


def test_doctor_names_wrong_settings(maisi, healthy, tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("stepz = 20\n")
    (tmp_path / "maisi.toml").write_text("steps = \n")
    (tmp_path / "maisi-presets").mkdir()
    (tmp_path / "maisi-presets" / "mine.toml").write_text(HEAD + VOLUME + "spacin = 1\n")
    monkeypatch.setenv("MAISI_STEPZ", "20")
    found = problems(maisi("doctor --json"))
    assert found == ["user config", "project config", "environment", "region presets"]
    err = maisi("doctor").err
    assert "did you mean 'steps'" in err
    assert "did you mean 'MAISI_STEPS'" in err
    assert err.endswith("4 problems\n")


def test_doctor_names_old_and_missing_packages(maisi, healthy, monkeypatch):
    from importlib import metadata

    needed = ["torch>=99.1", "no-such-package-here>=1", "numpy>=1.0", 'pytest>=99; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    assert problems(maisi("doctor --json")) == ["no-such-package-here", "torch"]
    out = maisi("doctor").out
    assert "older than 99.1" in out
    assert "missing, 1 is needed" in out


def test_doctor_names_a_gpu_that_torch_cannot_use(maisi, healthy, monkeypatch):
    found = devices.Gpu(name="NVIDIA Test", kind="cuda", memory_gib=24.0)
    monkeypatch.setattr(devices, "detect", lambda: found)
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: None)
    assert problems(maisi("doctor --json")) == ["gpu"]
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: "12.8")
    assert problems(maisi("doctor --json")) == []


def test_doctor_names_missing_bundled_weights_and_a_folder_it_cannot_write(maisi, healthy, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog.ModelSpec, "installed", lambda self, mode="paired": False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "file"))
    assert problems(maisi("doctor --json")) == ["weights folder", "model nano-ct"]


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda = '12.8'\n", "12.8"),
        ('cuda: Optional[str] = "13.0"\n', "13.0"),
        ("cuda: Optional[str] = None\n", None),
        ("# cuda = '12.8'\n", None),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(text, cuda, tmp_path, monkeypatch):
    from importlib import util

    (tmp_path / "version.py").write_text(f"debug = False\n{text}")
    spec = util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(util, "find_spec", lambda name: spec)
    assert doctor._cuda_of_torch() == cuda


def test_versions_compare_by_number():
    assert doctor._release("2.13.0+cpu") == (2, 13)
    assert doctor._release("2.9") < doctor._release("2.13")
    assert doctor._release("2") == doctor._release("2.0.0")


# --- all ------------------------------------------------------------------------------------


def test_light_commands_load_no_framework_and_pipes_stay_plain(tmp_path):
    script = """
import sys
from maisi_cli import cli
lines = ["presets list", "presets show 24g", "labels list", "labels show liver", "labels list --sets",
         "models list", "models show rflow-ct", "plugins list", "doctor --json", "presets validate chest"]
for line in lines:
    assert cli.run(line.split()) in (0, 1), line
    heavy = {"torch", "monai", "numpy", "scipy", "nibabel", "rich"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""
    home = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAISI_LOAD_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=home)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


def test_a_closed_pipe_is_no_error(tmp_path):
    home = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAISI_LOAD_PLUGINS": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "maisi_cli", "labels", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=home,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == cli.PIPE_CLOSED


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_alone_shows_its_help(group, maisi):
    done = maisi(group)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"Usage: maisi {group}")
    assert maisi(f"{group} -h").code == 0


def test_quiet_says_nothing_but_the_answer(maisi, files):
    for line in ("labels map seg.nii.gz a.nii.gz --from totalsegmentator", "presets new mine --from chest"):
        done = maisi(f"{line} -q")
        assert (done.code, done.err) == (0, "")
        assert Path(done.out.strip()).is_file()


def test_rows_of_labels_are_the_fields_of_a_label(maisi):
    (row,) = [row for row in maisi("labels list --json").json["labels"] if row["id"] == 1]
    assert set(row) == {field.name for field in dataclasses.fields(anatomy.Label)}
