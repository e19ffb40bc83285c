"""Compiled networks: which are wanted, under which key they are kept, and what was found when they were checked.

An engine is a part of a model (`unet`, `controlnet`, `decoder`, `mask_unet`) compiled for one shape by OpenVINO
(processors), AOTInductor (`aoti`) or TensorRT (`trt`). It lies in a folder of its own with a manifest, below `engines` in the
folder of weights, and is used again only where everything in its key is the same: weights, shapes, precision, versions and
device. This module loads no framework.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..catalog import home
from ..errors import CannotRun, UsageError
from ..files import write_atomic
from ..record import sha256_of

SCHEMA = "maisi.engine/1"
REVISION = 1
"""Of how networks are exported: raised when engines that were made before must not be used any more."""
BACKENDS = ("openvino", "aoti", "trt")
PARTS = ("unet", "controlnet", "decoder", "mask_unet")
TITLES = {"torch": "PyTorch", "openvino": "OpenVINO", "aoti": "AOTInductor", "trt": "TensorRT"}
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
"""The largest relative error (root mean square) of an engine's outputs against PyTorch in float32, by precision."""
_PACKAGES = {"openvino": ("openvino",), "aoti": ("torch",), "trt": ("torch_tensorrt", "tensorrt")}
_INSTALL = {"openvino": "pip install openvino", "aoti": "pip install torch", "trt": "pip install torch-tensorrt"}

Dims = tuple[int | tuple[int, int, int], ...]
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What an engine was made of and for; one that differs in anything is another engine.

    `weights` is the sha256 of the weight file; `inputs` the extent of every input by name and axis, or (smallest, best,
    largest); `environment` the versions and the device that the compiled code depends on.
    """

    backend: str
    part: str
    weights: str
    precision: str
    inputs: tuple[tuple[str, Dims], ...]
    environment: tuple[tuple[str, str], ...]
    revision: int = REVISION

    def as_dict(self) -> dict[str, Any]:
        """Return the key as it stands in the manifest."""
        return {
            "backend": self.backend, "part": self.part, "weights": self.weights, "precision": self.precision,
            "inputs": [[name, [list(n) if isinstance(n, tuple) else n for n in dims]] for name, dims in self.inputs],
            "environment": dict(self.environment), "revision": self.revision,
        }  # fmt: skip

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Key:
        """Return the key of a manifest. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for anything else."""
        inputs = tuple((name, tuple(tuple(n) if isinstance(n, list) else int(n) for n in dims)) for name, dims in data["inputs"])
        return cls(backend=data["backend"], part=data["part"], weights=data["weights"], precision=data["precision"],
                   inputs=inputs, environment=tuple(sorted(data["environment"].items())), revision=data["revision"])  # fmt: skip

    def digest(self) -> str:
        """Return the name of the engine: 16 hexadecimal digits of the key's sha256."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def covers(self, shapes: Shapes) -> bool:
        """Say whether the engine takes inputs of these shapes: the same names, and each extent as it is or within its range."""
        own = dict(self.inputs)
        return own.keys() == dict(shapes).keys() and all(
            len(own[name]) == len(shape) and all(_takes(n, int(given)) for n, given in zip(own[name], shape, strict=True))
            for name, shape in shapes.items()
        )

    @property
    def dynamic(self) -> bool:
        """Whether an extent has a range."""
        return any(isinstance(n, tuple) for _, dims in self.inputs for n in dims)


def _takes(own: int | tuple[int, int, int], given: int) -> bool:
    return own[0] <= given <= own[2] if isinstance(own, tuple) else own == given


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine on this machine: its key, folder and files (sha256 by name), and what its check found.

    `errors` are relative errors by output against PyTorch in float32; `outcome` is what else the backend tells; `seconds` of
    one call, `engine` and `torch`, where they were measured.
    """

    key: Key
    folder: Path
    files: Mapping[str, str]
    errors: tuple[float, ...]
    outcome: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest of the relative errors."""
        return max(self.errors)

    def bytes(self) -> int:
        """Return the size of its files."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest."""
        return {"schema": SCHEMA, "key": self.key.as_dict(), "files": dict(self.files), "errors": list(self.errors),
                "outcome": dict(self.outcome), "seconds": dict(self.seconds)}  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return what a run record says of the engine."""
        return {"backend": self.key.backend, "engine": self.key.digest(), "precision": self.key.precision, "error": self.error,
                "environment": dict(self.key.environment), **self.outcome}  # fmt: skip


def network_of(part: str) -> str:
    """Return the network that a part belongs to, where it is not one by itself."""
    return {"decoder": "vae"}.get(part, part)


def root() -> Path:
    """Return the folder of all engines."""
    return home() / "engines"


# --- what is wanted -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which backend a run is to use, `torch` or one of `BACKENDS`; `must`: an error where there is no engine."""

    backend: str
    must: bool = False
    reason: str = ""


def wish(engine: str, trt: str) -> Wish:
    """Return the backend for the settings `engine` and `trt`. Raises `UsageError` for settings that contradict one another."""
    if trt != "off":
        if engine not in ("torch", "trt"):
            raise UsageError(f"--engine {engine} and --trt {trt} exclude each other", hint="leave one of them out")
        return Wish(backend="trt", must=trt == "require", reason=f"--trt {trt}")
    return Wish(backend=engine, must=engine != "torch", reason=f"--engine {engine}")


def installed(backend: str) -> bool:
    """Say whether the packages of a backend are there; none is imported."""
    return all(find_spec(name) is not None for name in _PACKAGES[backend])


def require(backend: str, *, device: str, precision: str) -> None:
    """Refuse a backend that this machine, device or precision does not have. Raises `CannotRun` or `UsageError`."""
    title = TITLES[backend]
    if backend == "torch":
        return
    missing = [name for name in _PACKAGES[backend] if find_spec(name) is None]
    if missing:
        raise CannotRun(f"{title} is not installed: there is no package {' or '.join(missing)}", hint=_INSTALL[backend])
    if backend == "openvino" and device != "cpu":
        raise UsageError(
            f"OpenVINO compiles for processors here, and the device is {device}", hint="add --device cpu, or leave --engine out"
        )
    if backend == "openvino" and precision == "fp16":
        raise UsageError("OpenVINO computes in fp32 or bf16 here, and --dtype is fp16", hint="use --dtype bf16, or fp32")
    if backend == "trt" and not device.startswith("cuda"):
        raise CannotRun(f"TensorRT needs a CUDA device, and the device is {device}", hint="use --engine openvino on a processor")
    if device == "mps":
        raise CannotRun(f"{title} compiles for a processor or CUDA, and the device is mps", hint="use --engine torch")


def version(package: str) -> str:
    """Return the installed version of a package, or `absent`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """Return the model of this machine's processor, with what tells apart models of one name where the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    first: dict[str, str] = {}
    for line in lines:
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon and first:
            break  # the next core
        first[name] = value
    flags = hashlib.sha256(" ".join(sorted(first.get("flags", "").split())).encode()).hexdigest()[:8]
    return " ".join([*(first.get(name, "?") for name in ("model name", "cpu family", "model", "stepping")), flags])


# --- the folder -----------------------------------------------------------------------------


def built(*, backend: str | None = None, part: str | None = None) -> Iterator[Built]:
    """Yield the engines on this machine; a folder without a whole manifest is none."""
    for path in sorted(root().glob("*/*/manifest.json")):
        found = _read(path)
        if found is not None and backend in (None, found.key.backend) and part in (None, found.key.part):
            yield found


def _read(path: Path) -> Built | None:
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["schema"] != SCHEMA:
            return None
        return Built(key=Key.of(data["key"]), folder=path.parent, files=data["files"], errors=tuple(data["errors"]),
                     outcome=data["outcome"], seconds=data["seconds"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find(backend: str, part: str, *, weights: str, precision: str, environment: Mapping[str, str], shapes: Shapes) -> Built | None:
    """Return the engine that fits, one for exactly these shapes before one for a range of them; None where there is none."""
    fitting = [
        each for each in built(backend=backend, part=part)
        if (each.key.weights, each.key.precision, each.key.revision) == (weights, precision, REVISION)
        and dict(each.key.environment) == dict(environment) and each.key.covers(shapes)
    ]  # fmt: skip
    return min(fitting, key=lambda each: each.key.dynamic, default=None)


def verify(engine: Built) -> None:
    """Compare the files of an engine with what the manifest says, before any is loaded. Raises `CannotRun`."""
    for name, sha256 in engine.files.items():
        path = engine.folder / name
        if Path(name).name != name or not path.is_file() or sha256_of(path) != sha256:
            raise CannotRun(f"the engine {engine.folder} is damaged: {name} is not what was built", hint="maisi export-trt --clean --force")


def store(key: Key, build: Callable[[Path], tuple[Sequence[float], Mapping[str, Any], Mapping[str, float]]]) -> Built:
    """Build an engine in a folder that appears complete or not at all, in place of an earlier one of the same key.

    `build(folder)` writes the files and returns errors, outcome and seconds; what it raises leaves nothing behind. Raises
    `CannotRun` for a disk that is full or read-only.
    """
    target = root() / key.backend / key.digest()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        staging = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    except OSError as error:
        raise CannotRun(
            f"cannot write to {target.parent}: {error.strerror}", hint="set MAISI_HOME to a folder that can be written to"
        ) from error
    try:
        errors, outcome, seconds = build(staging)
        files = {path.name: sha256_of(path) for path in sorted(staging.iterdir()) if path.is_file()}
        made = Built(key=key, folder=target, files=files, errors=tuple(errors), outcome=outcome, seconds=seconds)
        note(made, staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
    except OSError as error:
        raise CannotRun(
            f"cannot write to {staging.parent}: {error.strerror or error}", hint="free disk space, or set MAISI_HOME"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


def note(engine: Built, folder: Path | None = None) -> None:
    """Write the manifest of an engine."""
    text = json.dumps(engine.as_dict(), indent=2, sort_keys=True)
    write_atomic((folder or engine.folder) / "manifest.json", f"{text}\n".encode())


def remove(engines: Iterable[Built]) -> list[Path]:
    """Remove engines, and the folders that become empty; return the folders."""
    gone = []
    for engine in engines:
        shutil.rmtree(engine.folder, ignore_errors=True)
        gone.append(engine.folder)
    for folder in [*{each.parent for each in gone}, root()]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return gone


def sweep() -> list[Path]:
    """Remove folders below those of backends that are no engines: what was interrupted, or is of another layout."""
    whole = {each.folder for each in built()}
    gone = [folder for folder in sorted(root().glob("*/*")) if folder.is_dir() and folder not in whole]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return gone
