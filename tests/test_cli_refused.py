"""What comes from outside and is wrong (weights, downloads, archives, label maps): from the command line to an empty disk.

Each is refused with its exit code, in one line that says what is wrong and one that says what to do; no network is run, no code
in a file either, and neither `--out` nor the folder of weights holds anything afterwards.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from maisi_cli import cli
from maisi_cli.testing import TINY, tiny_model
from maisi_cli.weights import load_state, save_state

from .fakehub import FILES, MASKS, REPO, SIZES, FakeHub, checkpoints, isolated, model_text, publish, released, saved, states, zipped
from .test_cli_wrong_input import SPACING, label_map, refused, save, tree

PULL = "models pull hub.toml --accept-license"
LOOSE = "models pull loose.toml --accept-license"
VOLUME = "generate --model {model} --size 32x32x32 --spacing 12 --seed 1 --out new"
MASK = "generate --model tiny.toml --seed 1 --out new --mask wrong.nii.gz"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Iterator[FakeHub]:
    """Work in a folder with a model of one's own, one of the hub, and one of the hub without hashes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAISI_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with isolated(monkeypatch, tmp_path / "home") as server:
        (tmp_path / "hub.toml").write_text(model_text(pins=publish(server)))
        (tmp_path / "loose.toml").write_text(model_text())
        yield server


def without_first(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


def reshaped(tensors: dict[str, Any]) -> dict[str, Any]:
    first = next(key for key, value in tensors.items() if value.ndim > 1)
    return tensors | {first: tensors[first][:1]}


# --- weights from the hub ---------------------------------------------------------------------------

UNET = FILES["unet"][0]
VAE = FILES["vae"][0]


def cut_short(server: FakeHub) -> None:
    content = server.read(server.files[REPO, VAE])
    server.swap[VAE] = content[: len(content) // 2]


def other_bytes(server: FakeHub) -> None:
    server.swap[VAE] = b"x" * len(server.read(server.files[REPO, VAE]))


def replaced(server: FakeHub) -> None:
    server.put(REPO, UNET, checkpoints()[VAE])


def with_code(server: FakeHub) -> None:
    content = released("unet", states()["unet"]) | {"extra": Bomb(Path("ran").absolute())}
    server.put(REPO, UNET, saved(content))


def leads_outside(server: FakeHub) -> None:
    server.put(REPO, MASKS, zipped("all_masks/a.nii.gz", "../outside.nii.gz"))


def no_zip(server: FakeHub) -> None:
    server.put(REPO, MASKS, b"PK\3\4 and no more")


def vae_as_unet(server: FakeHub) -> None:
    server.put(REPO, UNET, saved(released("unet", states()["vae"])))


def keys_missing(server: FakeHub) -> None:
    server.put(REPO, UNET, saved(released("unet", without_first(states()["unet"]))))


def shapes_off(server: FakeHub) -> None:
    server.put(REPO, UNET, saved(released("unet", reshaped(states()["unet"]))))


def as_it_is(server: FakeHub) -> None:
    """The licence alone is what is wrong."""


FETCHED = [
    (as_it_is, "models pull hub.toml", 3, "Test Licence (https://example.org/licence; commercial use allowed), which is not accepted yet",
     "maisi models pull hub.toml --accept-license"),
    (cut_short, PULL, 3, "arrived incomplete", "run it again: it goes on after"),
    (other_bytes, PULL, 3, "arrived damaged: its hash is", "run it again"),
    (replaced, PULL, 3, f"the hub has another {UNET}", "update maisi"),
    (with_code, LOOSE, 2, "holds more than tensors", "nothing of it was kept"),
    (leads_outside, f"{LOOSE} --mask-database", 2, "has a member that leads outside: '../outside.nii.gz'", "nothing of it was kept"),
    (no_zip, f"{LOOSE} --mask-database", 2, "is not a whole zip", "nothing of it was kept"),
    (vae_as_unet, LOOSE, 2, "does not fit its network", "nothing of it was kept"),
    (keys_missing, LOOSE, 2, "1 keys missing", "nothing of it was kept"),
    (shapes_off, LOOSE, 2, "1 of another shape", "nothing of it was kept"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "line", "code", "says", "hint"), FETCHED, ids=[row[0].__name__ for row in FETCHED])
def test_weights_from_the_hub(
    spoil: Callable[[FakeHub], None], line: str, code: int, says: str, hint: str, hub: FakeHub, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(hub)
    before = tree(tmp_path)
    refused(line, code, says, hint, capsys)
    left = [Path(name) for name, content in tree(tmp_path).items() if name not in before and content is not None]
    good = {end for path, _ in FILES.values() for end in (f"{Path(path).stem}.safetensors", f"{Path(path).stem}.safetensors.origin.json")}
    good = {name for name in good if "mask" in line or not name.startswith(Path(UNET).stem)} | {Path(SIZES).name}
    good |= {f"{Path(SIZES).name}.origin.json"}
    if spoil is cut_short:  # what has arrived waits, hidden, for the next try, which completes it
        assert sorted(path.suffix for path in left) == [".part"]
        hub.swap.clear()
        assert cli.run(shlex.split(line)) == 0
        return
    if code == 3:
        assert tree(tmp_path) == before
    assert {path.name for path in left} <= good, left  # what arrived whole before it stays for the next try
    if "mask" not in line:  # what arrived is no model
        refused("generate --model loose.toml --size 32 --spacing 12 --out new -q", 3, "is not installed", "maisi models pull", capsys)
        assert not Path("new").exists()


# --- weights of one's own ---------------------------------------------------------------------------


def own(change: Callable[[dict[str, Any]], dict[str, Any]], *, of: str = "unet") -> Callable[[], None]:
    """Return what replaces the UNet's file by the changed tensors of a network."""

    def spoil() -> None:
        tensors = dict(load_state(Path(f"{of}.safetensors")).tensors)
        save_state(Path("unet.safetensors"), change(tensors), metadata={}, half=False)

    return spoil


def half_a_file() -> None:
    content = Path("unet.safetensors").read_bytes()
    Path("unet.safetensors").write_bytes(content[: len(content) // 2])


def empty_file() -> None:
    Path("unet.safetensors").write_bytes(b"")


def text_file() -> None:
    Path("unet.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def released_with_code() -> None:
    torch.save({"unet_state_dict": {}, "extra": Bomb(Path("ran").absolute())}, "unet.pt")
    Path("tiny.toml").write_text(TINY.replace('path = "unet.safetensors"', 'path = "unet.pt"\nlayout = "unet"'))


def other_layout() -> None:
    torch.save({"controlnet_state_dict": dict(load_state(Path("unet.safetensors")).tensors)}, "unet.pt")
    Path("tiny.toml").write_text(TINY.replace('path = "unet.safetensors"', 'path = "unet.pt"\nlayout = "unet"'))


def scale_of_nan() -> None:
    tensors = load_state(Path("unet.safetensors")).tensors
    save_state(Path("unet.safetensors"), tensors, metadata={"scale_factor": "nan"}, half=False)


def gone() -> None:
    Path("unet.safetensors").unlink()


OWN = {
    "the VAE as UNet": (own(dict, of="vae"), 2, "unet.safetensors does not fit its network", "belong together"),
    "a key missing": (own(without_first), 2, "1 keys missing", "belong together"),
    "a shape off": (own(reshaped), 2, "1 of another shape", "belong together"),
    "an excess key": (own(lambda tensors: tensors | {"more": torch.ones(1)}), 2, "unexpected more", "belong together"),
    "half a file": (half_a_file, 2, "unet.safetensors is damaged", "fetch the file again"),
    "an empty file": (empty_file, 2, "unet.safetensors is damaged", "fetch the file again"),
    "a pointer instead of the file": (text_file, 2, "unet.safetensors is damaged", "fetch the file again"),
    "code in a pickle": (released_with_code, 2, "unet.pt is damaged, or holds more than tensors", "convert it to safetensors"),
    "another layout": (other_layout, 2, "unet.pt does not have the layout 'unet'", "which part"),
    "a scale factor of NaN": (scale_of_nan, 2, "scale factor nan", "fetch the file again"),
    "no file": (gone, 3, "unet.safetensors is missing", "[[weights]] of tiny.toml"),
}


@pytest.mark.parametrize("name", OWN)
def test_weights_of_ones_own(name: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, code, says, hint = OWN[name]
    spoil()
    before = tree(tmp_path)
    for mode in ("paired", "image"):
        refused(f"{VOLUME.format(model='tiny.toml')} --mode {mode} -q", code, says, hint, capsys)
        assert tree(tmp_path) == before


def test_a_trap_is_a_trap(tmp_path: Path) -> None:
    """Else that no code runs would show nothing."""
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("was", "now", "says", "hint"),
    [
        ("[defaults]\nsteps = 2", "[defaults]\nstpes = 2", "no setting named 'stpes' (from model tiny)", "'steps'"),
        ("[defaults]\nsteps = 2", "[defaults]\nsteps = 'two'", "--steps 'two' (model tiny)", "whole number"),
        ("[defaults]\nsteps = 2", "defaults = 2", "defaults is 2, not a table", "[defaults]"),
        ('[scheduler]\nname = "rflow"', '[scheduler]\nnme = "ddpm"', "unknown key scheduler.nme", "'name'"),
        ('[scheduler]\nname = "rflow"', '[scheduler]\nname = "rflow"\nbeta_end = 0.02', "scheduler.beta_end is 0.02", "leave the key out"),
        ('[scheduler]\nname = "rflow"', '[scheduler]\nname = "rflow"\n[mask_scheduler]\nlatent_sise = [8, 8, 8]',
         "unknown key mask_scheduler.latent_sise", "'latent_size'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", ["", " --dry-run"])
def test_misspelt_model_files(
    was: str, now: str, says: str, hint: str, dry: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert was in TINY
    text = TINY.replace(was, now)
    if now.startswith("defaults"):
        text = text.replace(now, "").replace("[limits]", f"{now}\n[limits]")
    Path("tiny.toml").write_text(text)
    before = tree(tmp_path)
    refused(f"{VOLUME.format(model='tiny.toml')}{dry}", 2, says, hint, capsys)
    assert tree(tmp_path) == before


def test_a_modality_that_the_weights_never_saw(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(tmp_path)
    for line, model in ((VOLUME.format(model="tiny.toml"), "tiny"), ("generate --model nano-ct --out new", "nano-ct")):
        for dry in ("", " --dry-run"):
            says = f"the weights of {model} were not trained on mri-flair"
            refused(f"{line} --mode image --modality mri-flair{dry}", 2, says, "--model rflow-mr", capsys)
            assert tree(tmp_path) == before


# --- label maps -------------------------------------------------------------------------------------

BODY = label_map()


def on(affine: Any) -> Callable[[], None]:
    """Return what writes the body with this affine in its sform, unchecked."""

    def spoil() -> None:
        image = nibabel.Nifti1Image(BODY, np.diag([SPACING, SPACING, SPACING, 1]))
        header = image.header
        rows = np.asarray(affine, dtype=np.float32)
        header["srow_x"], header["srow_y"], header["srow_z"] = rows[:3]
        header["sform_code"], header["qform_code"] = 1, 0
        with Path("wrong.nii").open("wb") as file:  # nibabel would write the image's own affine
            file.write(header.binaryblock + b"\0" * 4)
            file.write(BODY.tobytes(order="F"))

    return spoil


def voxels(array: np.ndarray) -> Callable[[], None]:
    return lambda: save(Path("wrong.nii.gz"), array)


def raw(content: bytes) -> Callable[[], None]:
    return lambda: Path("wrong.nii.gz").write_bytes(content) and None


def half_a_map() -> None:
    save(Path("wrong.nii.gz"), BODY)
    content = Path("wrong.nii.gz").read_bytes()
    Path("wrong.nii.gz").write_bytes(content[: len(content) // 2])


FLAT = np.diag([SPACING, SPACING, 0, 1])
PARALLEL = np.array([[SPACING, SPACING, 0, 0], [0, 0, 0, 0], [0, 0, SPACING, 0], [0, 0, 0, 1]])
SHEARED = np.array([[SPACING, SPACING / 2, 0, 0], [0, SPACING, 0, 0], [0, 0, SPACING, 0], [0, 0, 0, 1]])
NOT_A_NUMBER = np.array([[np.nan, 0, 0, 0], [0, SPACING, 0, 0], [0, 0, SPACING, 0], [0, 0, 0, 1]])
ENDLESS = np.array([[SPACING, 0, 0, np.inf], [0, SPACING, 0, 0], [0, 0, SPACING, 0], [0, 0, 0, 1]])
LABEL_MAPS = {
    "an id over 255": (voxels(np.where(BODY == 1, 256, BODY.astype(np.int16)).astype(np.int16)), "label 256; labels lie in 0..255"),
    "fractions": (voxels(np.where(BODY == 1, 1.5, BODY).astype(np.float32)), "not whole"),
    "NaN": (voxels(np.where(BODY == 1, np.nan, BODY).astype(np.float32)), "not whole"),
    "complex numbers": (voxels(BODY.astype(np.complex64)), "complex64 values, not labels"),
    "an affine without depth": (on(FLAT), "spacing of 12x12x0 mm"),
    "an affine of parallel axes": (on(PARALLEL), "sheared affine"),
    "a sheared affine": (on(SHEARED), "sheared affine"),
    "an affine with NaN": (on(NOT_A_NUMBER), "not finite"),
    "an affine with infinity": (on(ENDLESS), "not finite"),
    "an affine of zeros": (on(np.zeros((4, 4))), "spacing of 0x0x0 mm"),
    "four axes": (voxels(np.repeat(BODY[..., None], 2, axis=3)), "4 axes (32x32x32x2)"),
    "a last axis of one": (voxels(BODY[..., None]), "4 axes (32x32x32x1)"),
    "an empty file": (raw(b""), "is not a NIfTI file"),
    "an empty archive": (raw(b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0"), "is not a NIfTI file"),
    "a text file": (raw(b"not an image\n"), "is not a NIfTI file"),
    "half a file": (half_a_map, "is damaged"),
}


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize("name", LABEL_MAPS)
def test_label_maps(name: str, dry: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, says = LABEL_MAPS[name]
    spoil()
    (written,) = tmp_path.glob("wrong.nii*")
    before = tree(tmp_path)
    refused(f"{MASK.replace('wrong.nii.gz', written.name)} -q{dry}", 2, says, "", capsys)
    assert tree(tmp_path) == before


def turned(degrees: float) -> np.ndarray:
    """Return an affine that is turned about two axes, mirrored along one, and lies far from the origin."""
    a, b = np.radians([degrees, degrees / 3])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-SPACING, SPACING, SPACING * 0.9])
    affine[:3, 3] = 111.25, -222.5, 333.125
    return affine


@pytest.mark.parametrize("degrees", [0, 7, 20, 80])
@pytest.mark.parametrize("shape", [(32, 32, 32), (30, 27, 32)])
def test_an_oblique_mask_keeps_its_affine(
    degrees: float, shape: tuple[int, int, int], hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = BODY[tuple(slice(n) for n in shape)]
    save(Path("own.nii.gz"), labels, turned(degrees))
    given = nibabel.load("own.nii.gz")
    assert cli.run(shlex.split(MASK.replace("wrong", "own") + " --on-qc-fail keep --name made -q --no-preview")) == 0, capsys.readouterr()
    for kind in ("image", "label"):
        made = nibabel.load(f"new/made_{kind}.nii.gz")
        assert made.shape == shape
        assert np.array_equal(made.get_sform(), given.get_sform())  # to the last bit
        assert np.allclose(made.get_qform(), given.get_sform(), atol=1e-3)
    assert np.array_equal(np.asarray(nibabel.load("new/made_label.nii.gz").dataobj), labels)


@pytest.mark.parametrize(("codes", "told"), [((1, 1), True), ((2, 4), True), ((1, 0), False), ((0, 1), False)])
def test_qform_and_sform_that_disagree(
    codes: tuple[int, int], told: bool, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sform is taken where both speak, and that is said: another program may take the other."""
    image = nibabel.Nifti1Image(BODY, np.diag([SPACING, SPACING, SPACING, 1]))
    image.set_qform(np.diag([-SPACING, SPACING, SPACING, 1]), code=codes[0])
    image.set_sform(np.diag([SPACING, SPACING, SPACING, 1]), code=codes[1])
    nibabel.save(image, "own.nii.gz")
    given = nibabel.load("own.nii.gz").affine
    assert cli.run(shlex.split(MASK.replace("wrong", "own") + " --on-qc-fail keep --name made --no-preview")) == 0
    assert ("qform and sform of own.nii.gz disagree" in capsys.readouterr().err) == told
    for kind in ("image", "label"):
        made = nibabel.load(f"new/made_{kind}.nii.gz")
        assert np.array_equal(made.get_sform(coded=True)[0], given)
        assert np.array_equal(made.get_qform(coded=True)[0], given)
