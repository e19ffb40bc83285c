"""`maisi fid`: the reference's numbers, caches, statistics, several processes, and what it tells of itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maisi_cli import cli, comparison
from maisi_cli.collection import Cache, cases, chosen, load_statistics
from maisi_cli.comparison import compare
from maisi_cli.errors import UsageError
from maisi_cli.features import Extractor, open_extractor
from maisi_cli.geometry import Geometry
from maisi_cli.phantom import body, render
from maisi_cli.plugins import plugins
from maisi_cli.record import sha256_of
from maisi_cli.slices import PLANES, PROFILES
from maisi_cli.team import Team
from maisi_cli.volumes import Volume, write_image, write_mask
from scipy import ndimage
from torch import nn

from .shell import Done

GRID = Geometry(size=(40, 32, 24), spacing=(9.0, 9.0, 9.0))
QUICK = "--spacing 8x8x8 --bootstrap 20"
SHARED = f"{QUICK} --cache features"  # which all tests but those of caches share


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with twelve phantoms in `real`, twelve others in `synth`, and those blurred in `blurred`."""
    folder = tmp_path_factory.mktemp("sets")
    for k in range(24):
        mask = body(GRID, 500 + k)
        image = render(mask, 500 + k)
        for name in ("real",) if k < 12 else ("synth", "blurred"):
            shown = replace(image, array=ndimage.gaussian_filter(image.array, 1.0)) if name == "blurred" else image
            write_image(shown, folder / name / f"{k:02}_image.nii.gz")
            write_mask(mask, folder / name / f"{k:02}_label.nii.gz")
    return folder


@pytest.fixture
def maisi(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Done]:
    """Run a command line where `real`, `synth` and `blurred` lie."""
    monkeypatch.setenv("MAISI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (sets / "features").mkdir(exist_ok=True)
    for name in ("real", "synth", "blurred", "features"):
        (tmp_path / name).symlink_to(sets / name)

    def run(line: str) -> Done:
        capsys.readouterr()
        code = cli.run(line.split())
        text = capsys.readouterr()
        return Done(code, text.out, text.err)

    return run


# --- the reference's numbers ----------------------------------------------------------------


class StandIn(nn.Module):
    """The network of the golden case, averaged over the slice."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.layers.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.layers(slices)
        return maps.mean((2, 3))


def golden(shared: Callable[[str], Path], folder: Path) -> Extractor:
    """Write the golden volumes as files, and return the golden extractor."""
    import nibabel

    arrays = np.load(shared("golden/u50_fid_2p5d/arrays.npz"))
    for side, name in (("real", "real"), ("syn", "synth")):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            nibabel.save(nibabel.Nifti1Image(arrays[f"{side}{k}"][0, 0], np.eye(4)), folder / name / f"{k}.nii.gz")
    path = shared("golden/u50_fid_2p5d/feature_net.pt")
    return Extractor(name="golden", network=StandIn(path), size=12, channels=3, sha256=sha256_of(path), licence="none",
                     profiles={"ct": "reference", "mr": "reference-mr"})  # fmt: skip


GOLDEN: dict[str, dict[str, Any]] = {
    "all": {}, "center0.4": {"center_slices": 0.4}, "center0.7_every2": {"center_slices": 0.7, "every": 2},
    "drop_empty": {"drop_below": 30.0},  # the threshold that the case was made with
}  # fmt: skip


def test_the_golden_distances_are_those_of_the_reference(shared: Callable[[str], Path], tmp_path: Path) -> None:
    using = golden(shared, tmp_path)
    expected = json.loads(shared("golden/u50_fid_2p5d/case.json").read_text())["scalars"]["fid(synth, real)"]
    assert set(expected) == set(GOLDEN)
    for case, changes in GOLDEN.items():
        found = compare(tmp_path / "real", tmp_path / "synth", features=using, changes={"target_shape": None, **changes},
                        bootstrap=0, baseline="none", metrics=["fid"])  # fmt: skip
        assert found is not None
        for ours, theirs in (*((plane, plane) for plane in PLANES), ("average", "avg")):
            assert found.fid[ours] == pytest.approx(expected[case][theirs], rel=1e-4), (case, ours)


def test_padding_and_files_give_the_distance_of_the_padded_arrays(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The whole path from files, in two batch sizes, against the matrix square root of scipy on features made by hand."""
    from scipy.linalg import sqrtm

    using = golden(shared, tmp_path)
    arrays = np.load(shared("golden/u50_fid_2p5d/arrays.npz"))
    rows: dict[str, list[np.ndarray]] = {"real": [], "syn": []}
    for side in rows:
        for k in range(4):
            padded = np.full((32, 32, 32), -1000.0, np.float32)
            padded[4:28, 5:27, 6:26] = arrays[f"{side}{k}"][0, 0]
            stack = np.moveaxis(padded, 2, 0).clip(-1000, 1000)
            stack = (stack - stack.min()) / (stack.max() - stack.min() + 1e-10)
            slices = np.stack([stack - mean for mean in (0.406, 0.456, 0.485)], axis=1).astype(np.float32)
            with torch.inference_mode():
                rows[side].append(using.network(torch.from_numpy(slices)).numpy())
    one, other = (np.concatenate(each).astype(np.float64) for each in rows.values())
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * np.trace(sqrtm(a @ b)).real
    for batch in (1, 64):
        found = compare(tmp_path / "real", tmp_path / "synth", features=using, changes={"target_shape": (32, 32, 32)}, bootstrap=0,
                        baseline="none", metrics=["fid"], batch=batch)  # fmt: skip
        assert found is not None
        assert found.fid["xy"] == pytest.approx(expected, rel=1e-4)


# --- the command ----------------------------------------------------------------------------


def test_the_json_has_everything_that_a_reviewer_asks_for(maisi: Callable[[str], Done]) -> None:
    done = maisi(f"fid real synth --json {SHARED}")
    assert done.code == 0, done.err
    found = done.json
    assert found["schema"] == "maisi.fid/1"
    assert found["fid"]["average"] == pytest.approx(np.mean([found["fid"][plane] for plane in PLANES]))
    assert found["n_volumes"] == {"real": 12, "synth": 12}
    for side in ("real", "synth"):
        slices = found["n_slices"][side]
        assert slices["total"] == slices["xy"] + slices["yz"] + slices["zx"]
        assert 12 <= found["effective_n"][side] < min(slices[plane] for plane in PLANES)
    assert (found["features"]["name"], found["features"]["size"]) == ("maisi-slices", 128)
    assert (found["profile"]["name"], found["profile"]["spacing_mm"]) == ("ct (changed)", [8.0, 8.0, 8.0])
    assert found["prdc"]["of"] == "volumes"
    assert 0 < found["organs"]["frechet"] < 5
    assert "liver" in found["organs"]["per_organ"]
    assert found["ci95"]["resamples"] == 20
    warnings = " ".join(found["warnings"])
    for words in ("not comparable to published FIDs", "real has 12 volumes", "count as"):
        assert words in warnings
    # the interval holds the estimate, and the baseline, as both sets are of one distribution
    for name in (*PLANES, "average"):
        low, high = found["ci95"][name]
        assert low <= found["fid"][name] <= high
        assert low <= found["baseline"]["at_these_sizes"][name] <= high
    assert found["baseline"]["average"] == pytest.approx(2 * found["baseline"]["at_these_sizes"]["average"])  # 6 against 12 volumes
    assert abs(found["kid"]["average"]["value"]) < 3 * found["kid"]["average"]["error"]


def test_blurred_volumes_lie_outside_of_the_baseline_and_fail_a_limit(maisi: Callable[[str], Done]) -> None:
    line = f"fid real blurred --metrics kid {SHARED}"
    done = maisi(f"{line} --json")
    found = done.json
    assert found["ci95"]["average"][0] > found["baseline"]["at_these_sizes"]["average"]
    assert found["kid"]["average"]["value"] > 3 * found["kid"]["average"]["error"]
    assert found["organs"] is None
    limit = found["fid"]["average"]
    assert maisi(f"{line} --max {limit * 1.01}").code == 0
    failed = maisi(f"{line} --max {limit * 0.99}")
    assert failed.code == 1
    assert failed.cells("")  # the numbers are printed all the same
    assert "is above" in failed.err


def test_a_table_shows_the_numbers_with_names_of_extractor_and_profile(maisi: Callable[[str], Done]) -> None:
    done = maisi(f"fid real synth {SHARED}")
    assert done.code == 0
    for words in ("FID", "95 % interval", "real against real", "halves of 6", "KID", "maisi-slices, 128 a slice, sha256",
                  "ct (changed), sha256", "12 volumes,", "which count as"):  # fmt: skip
        assert words in done.out
    assert "warning: maisi-slices: not comparable to published FIDs" in done.err
    quiet = maisi(f"fid real synth -q {SHARED}")
    assert quiet.err == ""
    assert "maisi-slices" in quiet.out


# --- caches and statistics ------------------------------------------------------------------


def test_cached_features_are_not_computed_again_and_give_the_same_numbers(
    maisi: Callable[[str], Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"fid real synth --cache kept --json {QUICK}"
    first = maisi(line).json
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 24
    monkeypatch.setattr("maisi_cli.collection.features_of", None)  # would fail if it were called
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "real", moved)  # files are known by their content
    assert maisi(line).json == first
    assert maisi(line.replace("real", "moved", 1)).json["fid"] == first["fid"]
    assert maisi("fid real synth --json").code != 0


def test_a_cache_of_another_profile_or_extractor_is_refused_naming_both(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    assert maisi(f"fid real synth --cache kept {QUICK}").code == 0
    before = sorted(path.name for path in (tmp_path / "kept").iterdir())
    done = maisi("fid real synth --cache kept --spacing 4x4x4")
    assert done.code == 2
    assert "profile ct (changed) (" in done.err
    assert "spacing_mm [8.0, 8.0, 8.0] against [4.0, 4.0, 4.0]" in done.err
    torch.manual_seed(0)
    from maisi_cli.backbones import SliceNet
    from maisi_cli.weights import save_state

    save_state(tmp_path / "anew.safetensors", SliceNet().state_dict(), metadata={})
    done = maisi(f"fid real synth --cache kept --features maisi-slices=anew.safetensors {QUICK}")
    assert done.code == 2
    assert "was made with features maisi-slices (" in done.err
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    done = maisi("fid real synth --cache full")
    assert (done.code, "no cache of features" in done.err) == (2, True)


def test_saved_statistics_stand_for_the_set(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    whole = maisi(f"fid real synth --json {SHARED}").json
    done = maisi("fid real --save real.npz --spacing 8x8x8 --cache features")
    assert (done.code, done.paths) == (0, [Path("real.npz")])
    assert (tmp_path / "real.npz").stat().st_size < 2**21
    found = maisi("fid real.npz synth --json --bootstrap 20 --cache features").json
    assert found["fid"] == pytest.approx(whole["fid"], rel=1e-12)
    for same in ("baseline", "prdc", "organs", "n_slices", "effective_n", "features", "profile", "warnings"):
        assert found[same] == whole[same], same
    assert found["kid"] is None
    assert any("real is saved statistics" in note for note in found["notes"])
    both = maisi("fid real.npz real.npz --json").json
    assert both["fid"]["average"] == pytest.approx(0, abs=1e-6)
    assert "12 files are the same in both sets" in both["warnings"]
    refused = maisi("fid real.npz synth --spacing 4x4x4")
    assert (refused.code, "spacing_mm" in refused.err) == (2, True)
    refused = maisi("fid real.npz synth --num-images 5")
    assert (refused.code, "of which --num-images cannot draw" in refused.err) == (2, True)
    refused = maisi("fid real --save real.npz")
    assert (refused.code, "already exists" in refused.err) == (2, True)


@pytest.mark.parametrize("volumes", [1, 2, 4])
def test_very_few_volumes_give_what_can_be_had_and_notes_for_the_rest(maisi: Callable[[str], Done], volumes: int) -> None:
    done = maisi(f"fid real synth --num-images {volumes} --json {SHARED}")
    assert done.code == 0, done.err
    found = done.json  # JSON has no NaN
    assert {key: found[key] is not None for key in ("ci95", "baseline", "kid", "prdc", "organs")} == {
        "ci95": volumes > 1, "baseline": volumes > 3, "kid": volumes > 2, "prdc": volumes > 1, "organs": False,
    }  # fmt: skip
    notes = " ".join(found["notes"])
    words = ("no interval", "no precision or recall", "no baseline", "no kernel distance", "no distance of organs")
    assert [each in notes for each in words] == [volumes < 2, volumes < 2, volumes < 4, volumes < 3, True]


def test_mr_has_a_profile_of_its_own_and_fewer_volumes_than_asked_for_are_said(maisi: Callable[[str], Done]) -> None:
    done = maisi("fid real synth --modality mr-t1 --num-images 40 --metrics fid --bootstrap 0 --baseline none --spacing 9x9x9 --json")
    found = done.json
    assert (found["profile"]["name"], found["profile"]["clip"]) == ("mr (changed)", None)
    assert any("trained on CT" in warning for warning in found["warnings"])
    assert [found[each] for each in ("ci95", "baseline", "kid", "prdc", "organs")] == [None] * 5
    assert "warning: synth has 12 volumes, fewer than the 40 asked for" in done.err


def test_damaged_statistics_are_refused(maisi: Callable[[str], Done], tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not an archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("bad", "other"):
        done = maisi(f"fid {name}.npz synth")
        assert done.code == 2, done.err
        assert f"{name}.npz" in done.err
    with pytest.raises(UsageError, match="no statistics of maisi"):
        load_statistics(tmp_path / "other.npz")


# --- which volumes --------------------------------------------------------------------------


def test_volumes_are_found_in_folders_and_lists_and_drawn_by_a_seed(tmp_path: Path) -> None:
    image = Volume(array=np.zeros((4, 4, 4), np.float32), geometry=Geometry(size=(4, 4, 4), spacing=(1.0, 1.0, 1.0)))
    for name in ("b", "a", "c", "d"):
        write_image(image, tmp_path / "deep" / f"{name}.nii.gz")
        (tmp_path / "deep" / f"{name}_label.nii.gz").write_bytes((tmp_path / "deep" / f"{name}.nii.gz").read_bytes())
    found = cases(tmp_path)
    assert [case.name for case in found] == ["a", "b", "c", "d"]
    assert found[0].label == tmp_path / "deep" / "a_label.nii.gz"
    (tmp_path / "list.txt").write_text("# mine\ndeep/c.nii.gz\n\ndeep/a.nii.gz\n")
    assert [case.name for case in cases(tmp_path / "list.txt")] == ["a", "c"]
    assert [case.name for case in chosen(found, 2, "sorted", 0)] == ["a", "b"]
    draws = {tuple(case.name for case in chosen(found, 2, "random", seed)) for seed in range(40)}
    assert len(draws) == 6  # all pairs
    assert chosen(found, 2, "random", 3) == chosen(found, 2, "random", 3)
    write_image(image, tmp_path / "deep" / "e_image.nii.gz")
    assert [case.name for case in cases(tmp_path)] == ["e"]
    (tmp_path / "list.txt").write_text("deep/none.nii.gz\n")
    for wrong, words in ((tmp_path / "list.txt", "which is not there"), (tmp_path / "deep" / "a.nii.gz", "one volume"),
                         (tmp_path / "nothing", "no file or folder")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            cases(wrong)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fid real", "nothing to compare with"),
        ("fid real --save real.npz --max 3", "--max needs a second set"),
        ("fid real synth --metrics fdi", "no metric named 'fdi'"),
        ("fid real synth --profile reference", "makes 3 channels"),
        ("fid real synth --features radimagenet", "no feature extractor"),
        ("fid real synth --center-slices 40", "not in 0..1"),
        ("fid real synth --num-images 0", "0 images are too few"),
        ("fid real synth --baseline half", "no baseline named"),
        ("fid real none", "no file or folder none"),
    ],
)
def test_wrong_use_is_refused_in_one_line(maisi: Callable[[str], Done], line: str, words: str) -> None:
    done = maisi(line)
    assert done.code == 2, done.err
    assert words in done.err
    assert not done.out


# --- several processes, and memory ----------------------------------------------------------

RUN = "from maisi_cli.__main__ import main; main()"


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments], cwd=folder, env=everything, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_each_process_computes_its_share_and_only_the_first_compares(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 first, then rank 0, which finds the other's features on the shared disk."""
    told: list[Any] = []

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Crew(Team):
        def gather(self, value: Any) -> list[Any]:
            if self.rank:
                told.append(value)
                return [value]
            return [value, told.pop(0)]

    def run(rank: int | None) -> Any:
        with monkeypatch.context() as patched:
            if rank is not None:
                patched.setattr("maisi_cli.comparison.team", lambda: contextlib.nullcontext(Crew(rank=rank, size=2)))
            return compare(sets / "real", sets / "synth", num_images=5, bootstrap=5, cache=tmp_path / f"kept{rank is None}",
                           changes={"spacing_mm": (9.0, 9.0, 9.0)}, metrics=["fid", "kid"])  # fmt: skip

    wanted = PROFILES["ct"].changed(spacing_mm=(9.0, 9.0, 9.0))
    Cache(folder=tmp_path / "keptFalse", extractor=open_extractor(), profile=wanted).check()  # which the first process does first
    assert run(1) is None
    assert len(list((tmp_path / "keptFalse").glob("*.npz"))) == 4  # two of five, of either set
    assert run(0).as_dict() == run(None).as_dict()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(sets: Path, tmp_path: Path) -> None:
    """The last digit of a sum depends on the number of threads, which is one everywhere here."""
    line = f"fid {sets / 'real'} {sets / 'synth'} --num-images 5 --metrics fid,kid,prdc --json {QUICK}"
    alone = json.loads(start(line.split(), tmp_path, MAISI_HOME=str(tmp_path / "one")).communicate(timeout=240)[0])
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MAISI_HOME": str(tmp_path / "two")}
    crew = [start(line.split(), tmp_path, RANK=str(k), LOCAL_RANK=str(k), **environment) for k in (0, 1)]
    out = [process.communicate(timeout=240) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], out
    together = json.loads(out[0][0])
    assert out[1][0] == ""
    for plane in (*PLANES, "average"):
        assert together["fid"][plane] == pytest.approx(alone["fid"][plane], rel=1e-10)
    assert together == alone


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_volumes(sets: Path, tmp_path: Path) -> None:
    peak = "import resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    code = f"from maisi_cli import fid; fid('real', 'synth', num_images=N, bootstrap=20, changes={{'spacing_mm': (4., 4., 4.)}}); {peak}"
    peaks = {}
    for n in (5, 40):
        folder = tmp_path / str(n)
        for name in ("real", "synth"):
            (folder / name).mkdir(parents=True)
            found = sorted((sets / name).glob("*_image.nii.gz"))
            for k in range(n):
                (folder / name / f"{k:02}_image.nii.gz").symlink_to(found[k % len(found)])
        done = subprocess.run([sys.executable, "-c", code.replace("N", str(n))], cwd=folder, text=True, capture_output=True, check=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})  # fmt: skip
        peaks[n] = int(done.stdout.split("peak")[1])
    assert peaks[40] < peaks[5] + 40, peaks  # MiB


def test_the_extractors_profiles_exist() -> None:
    assert set(open_extractor().profiles.values()) <= set(PROFILES)


# --- the page -------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "fid.md").read_text("utf-8")


def flags(path: str) -> set[str]:
    import typer

    command: Any = typer.main.get_command(cli.build())
    for word in path.split():
        command = command.commands[word]
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def test_the_page_names_what_there_is() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - {"--nproc-per-node", "--num"}  # of torchrun and accelerate
    assert named <= flags("fid") | flags("models pull") | flags("models list"), named
    table = PAGE.partition("## Profiles")[2].partition("## Extractors")[0]
    assert set(re.findall(r"^\| \| (.*) \|$", table, flags=re.M)[0].replace("`", "").split(" | ")) | {"reference-mr"} == set(PROFILES)
    assert set(re.findall(r"^- `([\w-]+)`:", PAGE, flags=re.M)) == {entry.name for entry in plugins().registry("features")}
    assert set(re.findall(r"`(maisi\.fid/\d)`", PAGE)) == {comparison.SCHEMA}
    for words in (f"below {comparison.FEW_VOLUMES} volumes", f"below {comparison.FEW_SLICES} slices"):
        assert words in PAGE
    assert (Path(__file__).resolve().parents[1] / "benchmarks" / "train_maisi_slices.py").is_file()


def test_the_profiles_of_the_page_are_those_of_the_package() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ") and " | " in line]
    cells = {row[0]: dict(zip(("reference", "ct", "mr"), row[1:], strict=True)) for row in rows}
    for name in ("reference", "ct", "mr"):
        found = PROFILES[name]
        assert cells["resampled"][name] == ("no" if found.spacing_mm is None else f"to {found.spacing_mm[0]:g} mm")
        shape = found.target_shape
        assert next(cell for key, cell in cells.items() if key.startswith("padded"))[name] == (
            f"to {shape[0]}x{shape[1]}x{shape[2]}" if shape else "no"
        )
        assert cells["values"][name].startswith("clipped to -1000..1000" if found.clip else "clipped to percentiles 0.5 and 99.5")
        assert ("0 and 1" in cells["scaled"][name]) == (found.scaling == "stack")
        assert cells["channels"][name] == (
            f"three copies, less {', '.join(map(str, found.subtract))}" if len(found.subtract) == 3 else "one"
        )
        assert cells["`--num-images N`"][name].startswith("the first" if found.order == "sorted" else "a random draw")
