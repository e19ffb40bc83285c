"""`maisi doctor`: what this installation and this machine are like, and what is wrong with them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import output
from .options import Json, Quiet, Verbose, examples

LOW_DISK_GIB = 1.0
Check = dict[str, Any]
"""One check: `name`, `value` (what was found), `ok`, and `hint` (the way out) where it is not."""


def doctor(
    compute: Annotated[bool, typer.Option("--compute", help="Also try convolutions and attention on the device; loads torch.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Device for --compute: auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Look over this installation: packages, GPU, memory, weights, plugins, settings; with --compute whether sums are right.

    Exit code 1 with named problems.
    """
    checks = [*_packages(), *_machine(), *_weights(), *_plugins(), *_settings(), *(_compute(device) if compute else [])]
    problems = [check for check in checks if not check["ok"]]
    if as_json:
        names = [check["name"] for check in problems]
        output.json_out({"schema": "maisi.doctor/1", "ok": not problems, "checks": checks, "problems": names})
    else:
        rows = [["ok" if check["ok"] else "PROBLEM", check["name"], check["value"]] for check in checks]
        output.table(["", "what", "found"], rows)
        for check in problems:
            output.say(f"{check['name']}: {check['hint'] or check['value']}")
        many = "s" if len(problems) > 1 else ""
        output.say(f"{len(problems)} problem{many}" if problems else "no problem found")
    if problems:
        raise typer.Exit(1)


def _check(name: str, value: object, *, ok: bool = True, hint: str | None = None) -> Check:
    return {"name": name, "value": str(value), "ok": ok, "hint": None if ok else hint}


def _packages() -> list[Check]:
    import platform
    from importlib import metadata

    from .. import __version__

    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [_check("maisi", __version__), _check("python", where)]
    try:
        needed = metadata.requires("maisi") or []
    except metadata.PackageNotFoundError:
        return [*checks, _check("packages", "maisi is not installed", ok=False, hint="pip install maisi")]
    return checks + [_package(text) for text in sorted(needed, key=str.casefold) if "extra ==" not in text]


def _package(requirement: str) -> Check:
    """Check one requirement of the package's metadata, such as `torch>=2.8`."""
    from importlib import metadata

    name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
    least = re.search(r">=\s*([0-9.]+)", requirement)
    wanted = least[1] if least else ""
    hint = f"pip install --upgrade '{requirement.split(';')[0].strip()}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _check(name, f"missing, {wanted or 'any version'} is needed", ok=False, hint=hint)
    if _release(version) < _release(wanted):
        return _check(name, f"{version}, older than {wanted}", ok=False, hint=hint)
    if name == "torch":
        cuda = _cuda_of_torch()
        return _check(name, f"{version}, CUDA {cuda}" if cuda else f"{version}, without CUDA")
    return _check(name, version)


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without trailing zeros: (2, 13) for `2.13.0+cpu`."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch was built with, read from its files without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if version is None or not version.is_file():
        return None
    text = version.read_text("utf-8")
    found = re.search(r"^cuda(?:\s*:[^=\n]*)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _machine() -> list[Check]:
    import shutil

    from ..catalog import home
    from ..devices import detect, host_memory_gib

    gpu, memory = detect(), host_memory_gib()
    if gpu.kind == "cuda":
        usable = _cuda_of_torch() is not None
        text = f"{gpu.name}, {gpu.memory_gib:g} GiB{'' if usable else ', which this build of torch cannot use'}"
        hint = "install a build of torch with CUDA, see https://pytorch.org/get-started/locally"
        checks = [_check("gpu", text, ok=usable, hint=hint)]
    else:
        checks = [_check("gpu", "none that the NVIDIA driver reports: everything runs on the processor")]
    cores = f"{os.cpu_count()} processor cores"
    checks.append(_check("memory", f"{'unknown' if memory is None else f'{memory:g} GiB'}, {cores}"))
    folder = home().absolute()
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = standing.is_dir() and os.access(standing, os.W_OK)
    hint = f"{standing} is not a folder that can be written to; set MAISI_HOME to one that is"
    checks.append(_check("weights folder", folder, ok=writable, hint=hint))
    free = shutil.disk_usage(standing).free / 2**30
    hint = "free some space, or set MAISI_HOME to another disk"
    return [*checks, _check("disk", f"{free:.1f} GiB free", ok=free >= LOW_DISK_GIB, hint=hint)]


def _weights() -> list[Check]:
    from ..catalog import models
    from ..errors import MaisiError

    try:
        specs = models()
    except MaisiError as error:
        return [_check("models", error.message, ok=False, hint=error.hint)]
    checks = []
    for spec in specs:
        there = spec.installed(spec.modes[0])
        value = ("bundled" if spec.bundled else "installed") if there else "not installed"
        hint = "its weights come with maisi: install maisi again"
        checks.append(_check(f"model {spec.name}", value, ok=there or not spec.bundled, hint=hint))
    return checks


def _plugins() -> list[Check]:
    from ..plugins import plugins

    checks = []
    for info in plugins().infos:
        if info.name != "defaults":
            hint = f"update or uninstall {info.package}, or leave it out with MAISI_LOAD_PLUGINS"
            value = info.problem or f"{info.package} {info.version}"
            checks.append(_check(f"plugin {info.name}", value, ok=info.problem is None, hint=hint))
    return checks


def _settings() -> list[Check]:
    from .. import presets, settings

    checks = []
    for name, path in (
        ("user config", settings.config_path()),
        ("project config", Path(settings.PROJECT_FILE)),
    ):
        value = path if path.is_file() else f"{path} (none)"
        checks.append(_read(name, value, settings.read_config, path, name))
    named = sorted(name for name in os.environ if name.startswith(settings.ENVIRONMENT_PREFIX))
    checks.append(_read("environment", ", ".join(named) or "no MAISI_* variable", settings.environment_layer))
    for kind, folder in presets.FOLDERS.items():
        checks.append(_read(f"{kind} presets", presets.shipped() / folder, presets.presets, kind))
    return checks


def _compute(name: str) -> list[Check]:
    """Check that the device computes what it should: some builds' 3D convolutions were silently wrong."""
    from .. import selftest
    from ..networks import device_named

    device = device_named(name)
    hint = "another build of torch or cuDNN computes it rightly; until then use another --dtype"
    return [_check(f"{device}: {found.name}", f"relative error {found.error:.1e}, allowed {found.allowed:.0e}", ok=found.ok, hint=hint)
            for found in selftest.check(device)]  # fmt: skip


def _read(name: str, value: object, read: Callable[..., object], *arguments: object) -> Check:
    from ..errors import MaisiError

    try:
        read(*arguments)
    except MaisiError as error:
        return _check(name, error.message, ok=False, hint=error.hint)
    return _check(name, value)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", epilog=examples("maisi doctor", "maisi doctor --compute --json"))(doctor)
