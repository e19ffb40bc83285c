"""`maisi export-trt`: networks compiled ahead of time, listed, checked and cleaned up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Force, Json, Offline, Quiet, Verbose, examples

if TYPE_CHECKING:
    from ..engines import Built
    from ..engines.making import Order, Sizes
    from ..settings import Resolved

_EPILOG = examples(
    "maisi export-trt --preset chest-abdomen --parts unet,controlnet --dry-run",
    "maisi export-trt --backend openvino --preset chest-abdomen --check",
    "maisi export-trt --list",
)


def export_trt(
    model: Annotated[str | None, typer.Option("--model", metavar="NAME|FILE.toml", help="A model; auto takes the preset's where it is installed, else nano-ct.  [default: auto]", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option("-p", "--preset", metavar="NAME", help="Region preset whose volume the engines are for.  [default: chest-abdomen]", show_default=False)] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="XxYxZ", help="Volume in voxels, in the place of the preset's.", show_default=False)] = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="MIN,BEST,MAX", help="Three volumes: one engine for all sizes between, slower than one for a single size.", show_default=False)] = None,
    window: Annotated[str | None, typer.Option("--window", metavar="XxYxZ", help="What the decoder is given at once, in latent voxels.  [default: the whole]", show_default=False)] = None,
    parts: Annotated[str, typer.Option("--parts", metavar="A,B", help="unet, controlnet, decoder, mask_unet.")] = "unet,controlnet",
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="trt, aoti or openvino.")] = "trt",
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="auto, fp32, bf16 or fp16.  [default: auto]", show_default=False)] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1.  [default: auto]", show_default=False)] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare outputs and time with PyTorch; an engine that is off or slower is removed, exit 1.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the engines on this machine.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove engines of other versions, devices and weights than are here; with --force all of them.")] = False,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Export the parts and show their operators; compile nothing.")] = False,
    force: Force = False,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Compile the networks of a model for one volume: TensorRT and AOTInductor beforehand, OpenVINO too.

    Every engine is compared with PyTorch before it is kept, and belongs to these weights, this shape, precision, version and
    device. What uses them is  maisi generate  with its options for engines.
    """
    from .. import engines
    from ..errors import UsageError, unknown

    if list_ and clean:
        raise UsageError("--list and --clean exclude each other", hint="clean first, then list")
    if list_:
        _show([each.as_dict() | {"folder": str(each.folder), "bytes": each.bytes()} for each in engines.built()], as_json=as_json)
        return
    if clean:
        _clean(force=force, as_json=as_json)
        return
    if backend not in engines.BACKENDS:
        raise unknown("backend", backend, engines.BACKENDS, see="maisi export-trt --help")
    names = list(dict.fromkeys(each.strip() for each in parts.split(",") if each.strip()))
    for name in names:
        if name not in engines.PARTS:
            raise unknown("part", name, engines.PARTS, see="maisi export-trt --help")
    if not names:
        raise UsageError("--parts names nothing to compile", hint="use --parts unet,controlnet")
    if profile is not None and backend == "openvino":
        raise UsageError("OpenVINO's engines are for one volume each", hint="leave --profile out, or use --backend trt or aoti")
    if profile is not None and size is not None:
        raise UsageError("--size and --profile exclude each other", hint="the second volume of --profile is the best one")
    volumes = None if profile is None else _volumes(profile)
    resolved = _resolved({"model": model, "preset": preset, "size": size if volumes is None else volumes[1], "dtype": dtype,
                          "device": device, "offline": offline or None})  # fmt: skip
    with output.events() as on_event:
        orders = _orders(resolved, names, backend, window=window, volumes=volumes, dry_run=dry_run)
        if dry_run:
            _dry_run(orders, as_json=as_json)
            return
        from ..engines import making

        rows, failed = [], None
        for order in orders:
            made, problem = _made(making, order, on_event, check=check, force=force)
            rows += [] if made is None else [made.as_dict() | {"folder": str(made.folder), "bytes": made.bytes()}]
            failed = failed or problem
            if problem is not None:
                output.fail(problem.message, problem.hint)
    _show(rows, as_json=as_json)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _made(making: Any, order: Order, on_event: Any, *, check: bool, force: bool) -> tuple[Built | None, Any]:
    """Return the engine of an order, made or found, and the `Rejected` that removed it, if any."""
    from .. import engines
    from ..errors import Rejected

    built = None if force else making.find_built(order)
    if built is not None:
        output.say(f"the {order.part} is there already: {built.folder}")
    try:
        built = built or making.make(order, on_event=on_event)
        return (making.check(order, built) if check else built), None
    except Rejected as error:
        if built is not None:
            engines.remove([built])
        return None, error


def _volumes(text: str) -> tuple[Any, Any, Any]:
    from ..errors import UsageError
    from ..geometry import parse_size

    found = [parse_size(each) for each in text.split(",")]
    if len(found) != 3 or any(not low <= best <= high for low, best, high in zip(*found, strict=True)):
        raise UsageError(f"--profile {text!r} is not three volumes, each at least as large as the one before",
                         hint="write it like --profile 256x256x128,512x512x128,512x512x512")  # fmt: skip
    return found[0], found[1], found[2]


def _resolved(flags: dict[str, Any]) -> Resolved:
    from ..manifest import resolve_all

    return resolve_all(flags)[0]


def _orders(
    resolved: Resolved, parts: list[str], backend: str, *, window: str | None, volumes: tuple[Any, Any, Any] | None, dry_run: bool
) -> list[Order]:  # fmt: skip
    """Return what is to be made, checked before any framework is loaded where that can be."""
    from .. import catalog, engines, planning, weights
    from ..errors import UsageError
    from ..geometry import parse_size

    spec = catalog.model(resolved.settings.model)
    for part in parts:
        if engines.network_of(part) not in spec.networks:
            raise UsageError(f"model {spec.name} has no {part}", hint="leave it out of --parts")
    plan = planning.plan(resolved)
    device, precision = str(plan.choice("device")), str(plan.choice("dtype"))
    if not dry_run:
        engines.require(backend, device=device, precision=precision)
    files = weights.locate(spec, [engines.network_of(part) for part in parts])
    from .. import networks
    from ..engines.making import Order

    place = networks.device_named(device)
    latent = resolved.settings.geometry().latent_size(spec.latent_factor)
    sizes: Sizes | None = None
    if volumes is not None:
        sizes = tuple(tuple(n // spec.latent_factor for n in volume) for volume in volumes)  # type: ignore[assignment]
    made = []
    for part in parts:
        own: tuple[int, ...] = latent
        if part == "mask_unet":
            own = tuple(int(n) for n in spec.mask_scheduler.get("latent_size", (64, 64, 64)))
        if part == "decoder" and window is not None:
            own = tuple(map(min, latent, parse_size(window)))
        ranged = sizes if own == latent else None
        made.append(
            Order(spec=spec, part=part, file=files[engines.network_of(part)], size=own, backend=backend, precision=precision, device=place,
                  residuals=part == "unet" and "controlnet" in spec.networks, sizes=ranged)
        )  # fmt: skip
    return made


def _dry_run(orders: list[Order], *, as_json: bool) -> None:
    """Export every part and show what stands in its graph, and what Torch-TensorRT has no converter for, where it is here."""
    from ..engines import TITLES, making

    rows = [making.surveyed(order) for order in orders]
    if as_json:
        output.json_out({"schema": "maisi.engines-plan/1", "parts": rows})
        return
    for row in rows:
        output.data(f"{row['part']}: {row['inputs']} inputs, {sum(row['operators'].values())} operators of {len(row['operators'])} kinds")
        output.table(["operator", "times"], [*row["operators"].items()], right=("times",))
        if row["uncovered"] is None:
            output.say(f"what {TITLES['trt']} covers of it is not known: Torch-TensorRT is not installed here")
        else:
            output.data(f"without a converter: {', '.join(row['uncovered']) or 'nothing'}")


def _show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        output.json_out({"schema": "maisi.engines/1", "engines": rows})
        return
    output.table(
        ["part", "backend", "dtype", "shape", "error", "engine s", "torch s", "MiB", "folder"], [_row(row) for row in rows],
        right=("error", "engine s", "torch s", "MiB"),
    )  # fmt: skip


def _row(row: dict[str, Any]) -> list[object]:
    key, seconds = row["key"], row["seconds"]
    shape: list[Any] = next((dims for _, dims in key["inputs"] if len(dims) == 5), [])
    extent = "x".join(f"{n[0]}..{n[2]}" if isinstance(n, list) else str(n) for n in shape[2:])
    times = [f"{seconds[side]:.4g}" if side in seconds else "" for side in ("engine", "torch")]
    return [
        key["part"],
        key["backend"],
        key["precision"],
        extent,
        f"{max(row['errors']):.2g}",
        *times,
        round(row["bytes"] / 2**20),
        row["folder"],
    ]


def _clean(*, force: bool, as_json: bool) -> None:
    from .. import engines

    stale = [each for each in engines.built() if force or not _usable(each)]
    gone = [str(path) for path in engines.remove(stale)]
    broken = [str(path) for path in engines.sweep()]
    if as_json:
        output.json_out({"schema": "maisi.engines-removed/1", "folders": gone + broken})
        return
    for path in gone + broken:
        output.data(path)
    output.say(f"{len(gone) + len(broken)} engines were removed")


def _usable(built: Built) -> bool:
    """Say whether an engine still fits this machine: revision, versions and device; and whether its weights are installed."""
    from .. import engines
    from ..catalog import models
    from ..engines import making
    from ..errors import CannotRun
    from ..record import sha256_of

    key = built.key
    if key.revision != engines.REVISION or not engines.installed(key.backend):
        return False
    from .. import networks

    cuda = "gpu" in dict(key.environment)
    try:
        device = networks.device_named("cuda" if cuda else "cpu")
    except CannotRun:
        return False
    if dict(key.environment) != making.backend_of(key.backend).environment(device):
        return False
    files = {spec.weight_path(weight) for spec in models() for weight in spec.weights if weight.part == engines.network_of(key.part)}
    return any(path.is_file() and sha256_of(path) == key.weights for path in files)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export-trt", epilog=_EPILOG)(export_trt)
