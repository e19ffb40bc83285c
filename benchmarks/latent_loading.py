"""Time to load latents: the reference's `_emb.nii.gz` (float32, channel last) against the `.npy` of `maisi data encode`.

    python benchmarks/latent_loading.py --size 512x512x128 --cases 4 --repeats 5

Both hold the same numbers, normally distributed as a trained VAE's roughly are, and both lie in the page cache: what is
compared is the work of a processor, one thread. `whole` ends in a float32 array (C, x, y, z), `stored` in one of the type that the
file has (ours: float16, which a GPU widens), `crop` in float32 of 32x32x16 latent voxels, which a file that is compressed as a whole
cannot give any sooner. Figures are medians over cases and repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from maisi_cli.geometry import format_triple, parse_size
from numpy.typing import NDArray

CROP = (32, 32, 16)
Load = Callable[[Path], NDArray[np.floating]]


def write(folder: Path, size: tuple[int, int, int], cases: int) -> list[tuple[Path, Path]]:
    """Write latents of volumes of `size` voxels in both forms; return the paths, a pair for each case."""
    paths = []
    for k in range(cases):
        latent = np.random.default_rng(k).standard_normal((4, *(n // 4 for n in size)), dtype=np.float32)
        theirs, ours = folder / f"{k}_emb.nii.gz", folder / f"{k}_latent.npy"
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(latent, 0, -1), np.eye(4)), theirs)
        np.save(ours, latent.astype(np.float16))
        paths.append((theirs, ours))
    return paths


def theirs_whole(path: Path) -> NDArray[np.float32]:
    """Read an embedding as the reference lays it out."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(nibabel.load(path).dataobj, dtype=np.float32), -1, 0))


def ours_whole(path: Path) -> NDArray[np.float32]:
    """Read a latent."""
    return np.asarray(np.load(path, mmap_mode="r"), dtype=np.float32)


def ours_stored(path: Path) -> NDArray[np.float16]:
    """Read a latent as it is stored, to be widened on the device."""
    return np.array(np.load(path, mmap_mode="r"))


def cropped(latent: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the middle of a latent."""
    starts = [(n - min(n, want)) // 2 for n, want in zip(latent.shape[1:], CROP, strict=True)]
    x, y, z = (slice(start, start + want) for start, want in zip(starts, CROP, strict=True))
    return np.asarray(latent[:, x, y, z], dtype=np.float32)


def ours_crop(path: Path) -> NDArray[np.float32]:
    """Read a part of a latent: only its pages are touched."""
    return cropped(np.load(path, mmap_mode="r"))


def median_ms(load: Load, paths: list[Path], repeats: int) -> float:
    """Return the median time of a load."""
    found = []
    for path in paths * repeats:
        start = time.perf_counter()
        load(path)
        found.append(time.perf_counter() - start)
    return 1000 * statistics.median(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="512x512x128", help="voxels of the volume; its latent has a quarter of them along each axis")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    size = parse_size(arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write(Path(folder), size, arguments.cases)
        theirs, ours = ([pair[k] for pair in pairs] for k in (0, 1))
        for one, other in pairs:
            assert np.allclose(theirs_whole(one), ours_whole(other), atol=4e-3)
        rows = [("whole", median_ms(theirs_whole, theirs, arguments.repeats), median_ms(ours_whole, ours, arguments.repeats)),
                ("stored", median_ms(theirs_whole, theirs, arguments.repeats), median_ms(ours_stored, ours, arguments.repeats)),
                ("crop", median_ms(lambda path: cropped(theirs_whole(path)), theirs, arguments.repeats),
                 median_ms(ours_crop, ours, arguments.repeats))]  # fmt: skip
        mib = [sum(path.stat().st_size for path in paths) / len(paths) / 2**20 for paths in (theirs, ours)]
    print(f"latents of {format_triple(size)} voxels: {mib[0]:.1f} MiB as .nii.gz, {mib[1]:.1f} MiB as .npy")
    for name, slow, fast in rows:
        print(f"{name:6}  .nii.gz {slow:8.2f} ms   .npy {fast:8.3f} ms   ratio {slow / fast:.0f}")


if __name__ == "__main__":
    main()
