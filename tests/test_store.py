"""Installed weights: bundles that install all of their files or none, and removal that leaves what others use."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from maisi_cli import catalog, store
from maisi_cli.catalog import Licence, ModelSpec, model
from maisi_cli.errors import CannotRun, MaisiError, Rejected, UsageError

from .fakehub import COMMIT, FILES, LICENCE, MASKS, REPO, SIZES, model_text

CONTENT = {**{path.replace(".pt", ".safetensors"): path.encode() * 50 for path, _ in FILES.values()}, SIZES: b"[]"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(spec: ModelSpec) -> None:
    """Install the model as a pull would, with other content: nothing here reads it."""
    for weight in spec.weights:
        file = spec.weight_path(weight)
        data = CONTENT.get(str(Path(weight.path).with_suffix(file.suffix)))
        if data is None:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        sha256, git_sha1 = store.hashes_of(file)
        origin = store.Origin(
            sha256=sha256, bytes=len(data), repo=REPO, revision=COMMIT, path=weight.path, layout=weight.layout, source_sha256="0" * 64,
            source_git_sha1=git_sha1, source_bytes=9, pinned=True, licence="Test Licence", licence_url="", commercial=True,
        )  # fmt: skip
        store.write_origin(file, origin)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    (tmp_path / "tiny-hub.toml").write_text(model_text())
    made = model(str(tmp_path / "tiny-hub.toml"))
    put(made)
    return made


@pytest.fixture
def bundle(spec: ModelSpec, tmp_path: Path) -> Path:
    store.export_bundle([spec], tmp_path / "tiny.tar")
    return tmp_path / "tiny.tar"


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Go to a machine without weights; return its home."""
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "there"))
    return tmp_path / "there"


# --- export and import ------------------------------------------------------------------------------


def test_a_bundle_carries_a_model_to_another_machine(
    spec: ModelSpec, bundle: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = elsewhere(monkeypatch, tmp_path)
    assert not spec.installed()
    done = store.import_bundle(bundle, accept_license=True)
    assert tree(there) == tree(home)
    assert done.models == ("tiny-hub",)
    assert len(done.files) == len(CONTENT)
    assert spec.installed()
    again = store.import_bundle(bundle, accept_license=True)
    assert (len(again.files), len(again.present)) == (0, len(CONTENT))
    assert sorted(path.name for path in (there / "models").iterdir()) == ["maisi-test"]


def test_the_same_weights_make_the_same_bundle(spec: ModelSpec, bundle: Path, tmp_path: Path) -> None:
    store.export_bundle([spec, spec], tmp_path / "again.tar")
    one, two = (manifest_of(path) for path in (bundle, tmp_path / "again.tar"))
    assert one["files"] == two["files"]
    store.export_bundle([spec], tmp_path / "third.tar")
    assert (tmp_path / "third.tar").read_bytes() == bundle.read_bytes()


def test_a_bundle_is_a_plain_tar_with_its_manifest_first(bundle: Path) -> None:
    with tarfile.open(bundle, "r:") as tar:
        names = tar.getnames()
    assert names == ["manifest.json", *(row["path"] for row in manifest_of(bundle)["files"])]
    assert all(name.startswith(f"models/{REPO}/{COMMIT}/") for name in names[1:])


def test_export_refuses_what_it_should(spec: ModelSpec, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already exists"):
        store.export_bundle([spec], bundle)
    store.export_bundle([spec], bundle, force=True)
    with pytest.raises(CannotRun, match="rflow-mr is not installed"):
        store.export_bundle([spec, model("rflow-mr")], tmp_path / "new.tar")
    with pytest.raises(UsageError, match="nano-ct has no files from the hub"):
        store.export_bundle([model("nano-ct")], tmp_path / "new.tar")
    spec.weight_path(spec.weights[0]).write_bytes(b"changed")
    with pytest.raises(Rejected, match="is not the file that was installed"):
        store.export_bundle([spec], tmp_path / "new.tar")
    assert not (tmp_path / "new.tar").exists()


def manifest_of(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as tar:
        found = tar.extractfile("manifest.json")
        assert found is not None
        data: dict[str, Any] = json.loads(found.read())
    return data


def rewritten(bundle: Path, change: Callable[[dict[str, Any], list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """Write a bundle again after `change` has had its manifest and members."""
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(bundle) as tar:
        for member in tar.getmembers()[1:]:
            content = tar.extractfile(member)
            assert content is not None
            members.append((member, content.read()))
    manifest = manifest_of(bundle)
    change(manifest, members)
    path = bundle.with_name("rewritten.tar")
    with tarfile.open(path, "w") as tar:
        text = json.dumps(manifest).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(text)
        for member, content in [(info, text), *members]:
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def rename(name: str, *, known: bool) -> Callable[..., None]:
    def change(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0][0].name = name
        if known:
            manifest["files"][0]["path"] = name

    return change


def link(kind: bytes) -> Callable[..., None]:
    def change(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0][0].type, members[0][0].linkname, members[0][0].size = kind, "/etc/passwd", 0

    return change


def alter(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members[0] = (members[0][0], b"x" + members[0][1][1:])


def lose(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.pop()


def twice(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append(members[0])


def forget(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    manifest["files"].pop()


def forge(**changes: Any) -> Callable[..., None]:
    def change(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        manifest.update(changes)

    return change


def unzip(manifest: dict[str, Any], members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Put a file that is no zip in the place of the mask database."""
    row, (member, _) = manifest["files"][0], members[0]
    row["path"] = member.name = f"models/{REPO}/{COMMIT}/{MASKS}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename("../../outside.json", known=True), "is no place for weights"),
        (rename("/outside.json", known=True), "is no place for weights"),
        (rename(f"models/{REPO}/{COMMIT}/../outside.json", known=True), "is no place for weights"),
        (rename(f"models/{REPO}/{COMMIT}/outside.pt", known=True), "is no place for weights"),
        (rename(f"models/{REPO}/{COMMIT}/a.json.origin.json", known=True), "is no place for weights"),
        (rename("models/.lock/a/b/c.json", known=True), "is no place for weights"),
        (rename("config.toml", known=True), "is no place for weights"),
        (rename("../../outside.json", known=False), "has a member that its manifest does not name"),
        (link(tarfile.SYMTYPE), "has a member that its manifest does not name"),
        (link(tarfile.LNKTYPE), "has a member that its manifest does not name"),
        (twice, "has a member that its manifest does not name"),
        (forget, "has a member that its manifest does not name"),
        (alter, "is not what the manifest names"),
        (lose, "it lacks models/"),
        (unzip, "is not a whole zip"),
        (forge(schema="maisi.bundle/2"), "its manifest is missing or of another form"),
        (forge(files=[]), "its manifest is missing or of another form"),
        (forge(files=[{"path": "a"}]), "its manifest is missing or of another form"),
        (forge(models="all"), "its manifest is missing or of another form"),
        (forge(models=[{"name": "x", "licence": {"name": "x", "url": "", "commercial": "yes"}}]), "its manifest is missing"),
    ],
)
def test_a_forged_bundle_installs_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], says: str
) -> None:
    path = rewritten(bundle, change)
    there, before = elsewhere(monkeypatch, tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says) as caught:
        store.import_bundle(path, accept_license=True)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    assert not there.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [0, 100, 600, 20_000, -600])
def test_a_cut_bundle_installs_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    data = bundle.read_bytes()
    last = manifest_of(bundle)["files"][-1]["bytes"]
    end = len(data.rstrip(b"\0")) + keep if keep < 0 else keep
    assert last < 600
    (tmp_path / "cut.tar").write_bytes(data[:end])
    there = elsewhere(monkeypatch, tmp_path)
    with pytest.raises(UsageError, match=r"cut.tar is not|cut.tar is damaged"):
        store.import_bundle(tmp_path / "cut.tar", accept_license=True)
    assert not there.exists()


def test_an_import_that_fails_leaves_what_was_there(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> None:
    there = elsewhere(monkeypatch, tmp_path)
    file = spec.weight_path(spec.weights[2])
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    before = tree(there)
    with pytest.raises(UsageError, match="exists and differs"):
        store.import_bundle(bundle, accept_license=True)
    assert tree(there) == before
    store.import_bundle(bundle, accept_license=True, force=True)
    assert file.read_bytes() != b"mine"
    assert len(tree(there)) == 2 * len(CONTENT)


def test_an_import_needs_room_and_an_accepted_licence(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = elsewhere(monkeypatch, tmp_path)
    with pytest.raises(CannotRun, match="under the Test Licence") as caught:
        store.import_bundle(bundle)
    assert caught.value.hint == f"read it, then  maisi models import {bundle} --accept-license"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(CannotRun, match="MiB free"):
        store.import_bundle(bundle, accept_license=True)
    assert not there.exists()


def test_the_catalogue_s_licence_counts_for_a_model_that_it_knows(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"name": "Free for all", "url": "", "commercial": True}
    path = rewritten(bundle, forge(models=[{"name": "rflow-mr", "licence": free}]))
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(CannotRun, match="NVIDIA Non-Commercial License, does not allow commercial use"):
        store.import_bundle(path, accept_license=True, commercial=True)


# --- licences ---------------------------------------------------------------------------------------


def refusal(licence: Licence, **flags: bool) -> MaisiError | None:
    try:
        store.check_licence("a", licence, **{"accepted": False, "commercial": False, **flags}, where="https://hub/a")
    except MaisiError as error:
        return error
    return None


def test_a_licence_is_accepted_by_a_flag_and_commercial_use_by_the_licence() -> None:
    open_one, research = Licence(name="Open", url="https://open", commercial=True), Licence(name="Research")
    assert refusal(open_one, accepted=True) is None
    assert refusal(open_one, accepted=True, commercial=True) is None
    assert refusal(research, accepted=True) is None
    assert "does not allow commercial use" in str(refusal(research, accepted=True, commercial=True))
    assert "Open (https://open; commercial use allowed)" in str(refusal(open_one))
    assert "Research (https://hub/a; commercial use not allowed)" in str(refusal(research))
    assert all(spec.licence.name and (spec.bundled or spec.licence.url or spec.weights[0].repo) for spec in catalog.models())


# --- removal ----------------------------------------------------------------------------------------


def test_removal_leaves_nothing_of_a_model(spec: ModelSpec, home: Path) -> None:
    (spec.weight_path(spec.weights[0]).parent / ".autoencoder_v1.pt.0123.part").write_bytes(b"half")
    removed, kept = store.remove(spec)
    assert kept == []
    assert len(removed) == 2 * len(CONTENT) + 1
    assert tree(home) == {}
    assert [path.name for path in (home / "models").iterdir()] == []
    assert store.remove(spec) == ([], [])


@pytest.fixture
def two(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, ModelSpec]:
    """Register two models that share their autoencoder."""
    own = dataclasses.replace(spec.weights[1], path="models/second.pt")
    second = dataclasses.replace(spec, name="second", weights=(spec.weights[0], own), modes=("image",))
    monkeypatch.setattr(store, "models", lambda: (spec, second))
    return spec, second


def test_removal_leaves_what_another_installed_model_uses(two: tuple[ModelSpec, ModelSpec]) -> None:
    first, second = two
    shared, own = (second.weight_path(weight) for weight in second.weights)
    own.write_bytes(b"unet")
    removed, kept = store.remove(first)
    assert kept == [shared]
    assert shared.is_file()
    assert store.origin_path(shared).is_file()
    assert not first.installed()
    assert second.installed("image")
    assert shared not in removed
    assert store.remove(second) == ([shared, store.origin_path(shared), own], [])


def test_removal_takes_shared_files_when_the_other_model_is_not_installed(two: tuple[ModelSpec, ModelSpec], home: Path) -> None:
    store.remove(two[0])
    assert tree(home) == {}


def test_files_that_came_with_maisi_or_are_one_s_own_are_not_removed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="came with maisi"):
        store.remove(model("nano-ct"))
    (tmp_path / "own.toml").write_text(model_text(licence=LICENCE).replace(f'repo = "{REPO}"\n', ""))
    with pytest.raises(UsageError, match="are your own"):
        store.remove(model(str(tmp_path / "own.toml")))


# --- archives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good"),
    [("a/b.nii.gz", True), ("a/", True), ("a..b", True), ("../a", False), ("a/../b", False), ("a/..", False), ("/a", False),
     ("a\\..\\b", False), ("C:/a", False), ("//host/a", False)],
)  # fmt: skip
def test_names_that_stay_inside(name: str, good: bool) -> None:
    assert store.inside(name) is good
