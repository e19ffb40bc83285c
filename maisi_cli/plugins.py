"""Finding, loading and listing plugins, and the registries that they fill.

`MAISI_LOAD_PLUGINS=a,b` loads only those entry points (empty: none); `MAISI_TRACE_PLUGINS=1` says on stderr what each
hook was called with. A plugin that fails to import or to register is reported once and skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pluggy

from . import hookspecs
from .errors import UsageError
from .registry import Registry

GROUP = "maisi"

KINDS: dict[str, tuple[str, str]] = {
    "models": ("model", "maisi models list"),
    "samplers": ("scheduler", "maisi plugins list"),
    "mask_sources": ("mask source", "maisi plugins list"),
    "labels": ("label", "maisi labels list"),
    "modalities": ("modality", "maisi labels list --modalities"),
    "checks": ("check", "maisi plugins list"),
    "features": ("feature extractor", "maisi models list --features"),
    "formats": ("format", "maisi plugins list"),
    "presets": ("preset", "maisi presets list"),
    "executors": ("executor", "maisi plugins list"),
    "trackers": ("tracker", "maisi plugins list"),
    "commands": ("command", "maisi --help"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One plugin: its entry point's name, its package and version, what it adds, or why it was skipped."""

    name: str
    package: str
    version: str
    adds: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugins:
    """The loaded plugins: pluggy's manager, one registry per kind, and what to tell about each plugin."""

    manager: pluggy.PluginManager
    registries: dict[str, Registry[Any]]
    infos: tuple[PluginInfo, ...]

    def registry(self, kind: str) -> Registry[Any]:
        """Return the registry of one kind: `samplers`, `checks`, ..."""
        return self.registries[kind]

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each plugin that was skipped."""
        return tuple(f"plugin {info.name}: {info.problem}" for info in self.infos if info.problem)


@cache
def plugins() -> Plugins:
    """Return the plugins of this process, loaded once."""
    return load(os.environ.get("MAISI_LOAD_PLUGINS"), trace=os.environ.get("MAISI_TRACE_PLUGINS") == "1")


def load(only: str | None = None, *, trace: bool = False, extra: dict[str, Any] | None = None) -> Plugins:
    """Load the built-in plugin, the installed ones (or those named in `only`) and `extra` objects by name."""
    from . import defaults

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if trace:
        manager.trace.root.setwriter(_write_trace)
        manager.enable_tracing()
    found: list[tuple[str, str, str, Any, str | None]] = []
    builtin_version = _version()
    found.append(("defaults", "maisi", builtin_version, defaults, None))
    wanted = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    for entry_point in _entry_points():
        if wanted is not None and entry_point.name not in wanted:
            continue
        package = entry_point.dist.name if entry_point.dist else "?"
        version = entry_point.dist.version if entry_point.dist else "?"
        try:
            found.append((entry_point.name, package, version, entry_point.load(), None))
        except Exception as error:
            problem = f"skipped, its import failed: {type(error).__name__}: {error}"
            found.append((entry_point.name, package, version, None, problem))
    for name in sorted((wanted or set()) - {row[0] for row in found} - {"defaults"}):
        found.append((name, "?", "?", None, "named in MAISI_LOAD_PLUGINS but not installed"))
    found.extend((name, "?", "?", plugin, None) for name, plugin in (extra or {}).items())

    registries: dict[str, Registry[Any]] = {kind: Registry(word, see=see) for kind, (word, see) in KINDS.items()}
    infos = []
    for name, package, version, plugin, trouble in found:
        adds: tuple[str, ...] = ()
        if plugin is not None:
            adds, trouble = _enlist(registries, plugin, manager, name=name, owner=package if package != "?" else name)
        infos.append(PluginInfo(name=name, package=package, version=version, adds=adds, problem=trouble))
    return Plugins(manager=manager, registries=registries, infos=tuple(infos))


def _enlist(
    registries: dict[str, Registry[Any]], plugin: Any, manager: pluggy.PluginManager, *, name: str, owner: str
) -> tuple[tuple[str, ...], str | None]:
    """Return what a plugin adds, and why it was skipped when its own code fails; a name taken twice is raised."""
    try:
        manager.register(plugin, name)
    except ValueError as error:  # its name is that of another plugin, or it is installed twice
        return (), f"skipped, {error}"
    except pluggy.PluginValidationError as error:
        if manager.is_registered(plugin):  # older pluggy has taken it in before it looks
            manager.unregister(plugin)
        return (), f"skipped, {' '.join(str(error).split())}"
    before = {kind: set(registry.names()) for kind, registry in registries.items()}
    try:
        return _fill(registries, plugin, manager, owner=owner), None
    except UsageError:
        raise
    except Exception as error:
        manager.unregister(plugin)
        for kind, registry in registries.items():
            for each in set(registry.names()) - before[kind]:
                registry.discard(each)
        return (), f"skipped, registering failed: {type(error).__name__}: {error}"


def _fill(registries: dict[str, Registry[Any]], plugin: Any, manager: pluggy.PluginManager, *, owner: str) -> tuple[str, ...]:
    others = [other for other in manager.get_plugins() if other is not plugin]
    added: list[str] = []

    def adder(kind: str) -> Callable[..., None]:
        def register(name: str, target: Any, *, summary: str = "") -> None:
            registries[kind].add(name, target, owner=owner, summary=summary)
            added.append(f"{KINDS[kind][0]} {name}")

        return register

    for kind in KINDS:
        manager.subset_hook_caller(f"register_{kind}", remove_plugins=others)(register=adder(kind))
    for listener in ("on_event", "finish_sample"):
        if hasattr(plugin, listener) and getattr(getattr(plugin, listener), "maisi_impl", None):
            added.append(f"listener {listener}")
    return tuple(added)


def _entry_points() -> list[Any]:
    from importlib.metadata import entry_points

    return sorted(entry_points(group=GROUP), key=lambda entry_point: entry_point.name)


def _version() -> str:
    from . import __version__

    return __version__


def _write_trace(text: str) -> None:
    import sys

    sys.stderr.write(text)
