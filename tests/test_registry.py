"""Registries, plugins and hooks: names and owners, plugins that fail, and that every hook is described and used."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from maisi_cli import defaults, hookspecs, plugins, quality, synthesis
from maisi_cli.errors import CannotRun, UsageError
from maisi_cli.events import Note
from maisi_cli.hookspecs import hookimpl
from maisi_cli.plugins import KINDS, Plugins, load
from maisi_cli.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
KINDS_OF_HOOKS = {f"register_{kind}" for kind in KINDS}
HOOKS = [name for name, hook in vars(hookspecs).items() if hasattr(hook, "maisi_spec")]


@dataclass
class EntryPoint:
    """An installed plugin, as importlib.metadata tells of it."""

    @dataclass
    class Dist:
        name: str
        version: str = "1.2.3"

    name: str
    plugin: Any
    dist: Dist | None
    loaded: int = 0

    def load(self) -> Any:
        self.loaded += 1
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[EntryPoint]]:
    """Return a function that lets these plugins be the installed ones, each in a package `NAME-package`."""

    def install(**named: Any) -> list[EntryPoint]:
        points = [EntryPoint(name, plugin, EntryPoint.Dist(f"{name}-package")) for name, plugin in named.items()]
        monkeypatch.setattr(plugins, "_entry_points", lambda: points)
        return points

    return install


class Sampler:
    """A plugin that registers one sampler."""

    def __init__(self, name: str = "leap", target: Any = "json:loads") -> None:
        self.name, self.target = name, target

    @hookimpl
    def register_samplers(self, register: Any) -> None:
        register(self.name, self.target, summary="of a test")


# --- registries -----------------------------------------------------------------------------


@pytest.fixture
def shapes() -> Registry[Any]:
    made: Registry[Any] = Registry("shape", see="maisi shapes list")
    made.add("square", "json:loads", owner="maisi", summary="four sides")
    made.add("circle", len, owner="acme")
    return made


def test_names_are_listed_in_order_with_owner_and_summary(shapes):
    assert shapes.names() == ["circle", "square"] == [entry.name for entry in shapes]
    assert (len(shapes), "square" in shapes, "triangle" in shapes) == (2, True, False)
    entry = shapes.entry("square")
    assert (entry.target, entry.owner, entry.summary) == ("json:loads", "maisi", "four sides")


def test_a_target_is_imported_when_it_is_used_and_an_object_is_itself(shapes, tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("def thing(): return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shapes.add("late", "late_module:thing", owner="acme")
    assert shapes.entry("late").target == "late_module:thing"
    assert "late_module" not in sys.modules
    assert shapes.get("late")() == 7
    monkeypatch.delitem(sys.modules, "late_module")
    assert shapes.get("circle") is len


@pytest.mark.parametrize(
    ("wrong", "hint"), [("sqare", "did you mean 'square'?"), ("Circle", "did you mean 'circle'?"), ("zzz", "see  maisi")]
)
def test_an_unknown_name_gets_near_matches_and_the_command_that_lists_all(wrong, hint, shapes):
    for find in (shapes.get, shapes.entry):
        with pytest.raises(UsageError, match=f"there is no shape named '{wrong}'") as caught:
            find(wrong)
        assert str(caught.value.hint).startswith(hint)
        assert str(caught.value.hint).endswith("see  maisi shapes list")


def test_a_name_taken_twice_names_both_owners_and_the_first_stays(shapes):
    with pytest.raises(UsageError, match="'square': maisi and acme") as caught:
        shapes.add("square", "json:dumps", owner="acme")
    assert "MAISI_LOAD_PLUGINS" in str(caught.value.hint)
    assert shapes.entry("square").owner == "maisi"


@pytest.mark.parametrize("target", ["no_such_module:thing", "json:no_such_thing", "json", ""])
def test_a_target_that_cannot_be_loaded_names_the_owner_to_install_again(target, shapes):
    shapes.add("lost", target, owner="acme")
    with pytest.raises(CannotRun, match="'lost' of acme cannot be loaded") as caught:
        shapes.get("lost")
    assert "install acme again" in str(caught.value.hint)


def test_a_registration_is_taken_back(shapes):
    shapes.discard("square")
    shapes.discard("never there")
    assert shapes.names() == ["circle"]


# --- which plugins are loaded -------------------------------------------------------------------


def test_installed_plugins_are_loaded_with_their_package_and_version(installed):
    installed(solvers=Sampler())
    made = load()
    assert [(info.name, info.package, info.version, info.problem) for info in made.infos[1:]] == [
        ("solvers", "solvers-package", "1.2.3", None)]  # fmt: skip
    assert made.infos[1].adds == ("scheduler leap",)
    assert made.registry("samplers").entry("leap").owner == "solvers-package"
    assert made.registry("samplers").entry("rflow").owner == "maisi"
    assert made.problems == ()


@pytest.mark.parametrize(
    ("only", "names"),
    [(None, ["one", "two"]), ("", []), ("two", ["two"]), (" two , one,", ["one", "two"]), ("defaults", []), ("three", ["three"])],
)
def test_only_those_that_are_named_are_loaded_and_the_built_in_one_always_is(only, names, installed):
    points = installed(one=Sampler("a"), two=Sampler("b"))
    made = load(only)
    assert [info.name for info in made.infos] == ["defaults", *names]
    assert {point.name for point in points if point.loaded} == set(names) - {"three"}
    assert [info.problem for info in made.infos if info.name == "three"] in ([], ["named in MAISI_LOAD_PLUGINS but not installed"])
    assert "rflow" in made.registry("samplers")


@pytest.mark.parametrize(("value", "found"), [(None, True), ("", False), ("other", False), ("solvers,other", True)])
def test_the_environment_says_which(value, found, installed, monkeypatch):
    installed(solvers=Sampler(), other=Sampler("b"))
    monkeypatch.delenv("MAISI_LOAD_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("MAISI_LOAD_PLUGINS", value)
    assert ("leap" in plugins.plugins.__wrapped__().registry("samplers")) is found


def test_tracing_says_on_stderr_which_hook_is_called(installed, monkeypatch, capsys):
    installed(solvers=Sampler())
    plugins.plugins.__wrapped__()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MAISI_TRACE_PLUGINS", "1")
    plugins.plugins.__wrapped__()
    captured = capsys.readouterr()
    assert "register_samplers" in captured.err
    assert captured.out == ""


# --- plugins that fail --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ImportError("no torch"), SyntaxError("bad"), RuntimeError("boom"), AttributeError("gone")])
def test_a_plugin_that_fails_to_import_is_told_once_and_skipped(error, installed):
    installed(broken=error, solvers=Sampler())
    made = load()
    assert made.problems == (f"plugin broken: skipped, its import failed: {type(error).__name__}: {error}",)
    assert [info.adds for info in made.infos if info.name == "broken"] == [()]
    assert "leap" in made.registry("samplers")


class HalfWay:
    """A plugin that registers something and then fails."""

    @hookimpl
    def register_samplers(self, register: Any) -> None:
        register("half", "json:loads")

    @hookimpl
    def register_checks(self, register: Any) -> None:
        raise RuntimeError("boom")

    @hookimpl
    def on_event(self, event: Any) -> None:
        raise AssertionError("it is not listening")


def test_a_plugin_that_fails_half_way_leaves_nothing_behind(installed):
    installed(half=HalfWay(), solvers=Sampler())
    made = load()
    assert made.problems == ("plugin half: skipped, registering failed: RuntimeError: boom",)
    assert "half" not in made.registry("samplers")
    assert "leap" in made.registry("samplers")
    assert "rflow" in made.registry("samplers")
    made.manager.hook.on_event(event=Note(text="all is well"))


def test_a_hook_with_another_argument_is_told_and_skipped(installed):
    class Misspelt:
        @hookimpl
        def register_samplers(self, regster: Any) -> None:
            regster("x", "json:loads")

    installed(wrong=Misspelt(), solvers=Sampler())
    made = load()
    (problem,) = made.problems
    assert problem.startswith("plugin wrong: skipped")
    assert "regster" in problem
    assert {"ddpm", "leap", "rflow"} <= set(made.registry("samplers").names())
    assert "x" not in made.registry("samplers")


def test_a_plugin_with_the_name_of_another_is_told_and_skipped():
    made = load("", extra={"defaults": Sampler()})
    (problem,) = made.problems
    assert problem.startswith("plugin defaults: skipped")
    assert "leap" not in made.registry("samplers")


def test_two_plugins_that_register_one_name_are_both_named(installed):
    installed(one=Sampler(), two=Sampler())
    with pytest.raises(UsageError, match="the scheduler 'leap': one-package and two-package"):
        load()
    assert "leap" in load("two").registry("samplers")


def test_a_plugin_may_not_replace_what_comes_with_maisi(installed):
    installed(mine=Sampler("rflow"))
    with pytest.raises(UsageError, match="'rflow': maisi and mine-package"):
        load()


# --- hooks --------------------------------------------------------------------------------------


def used_by_plugins() -> set[str]:
    """Return the hooks that the built-in plugin and the packages in plugins/ implement, read from their source."""
    used = set()
    for path in [Path(inspect.getfile(defaults)), *(ROOT / "plugins").glob("*/*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(each).startswith("hookimpl") for each in node.decorator_list):
                used.add(node.name)
    return used


def test_every_hook_says_what_it_is_for():
    for name in HOOKS:
        text = inspect.getdoc(getattr(hookspecs, name))
        assert text, name
        if name.startswith("register_"):
            assert text.startswith("Add "), name
            assert 'register("' in text or "The target is" in text, name


def test_there_is_a_registry_for_every_hook_that_registers_and_no_other():
    assert {name for name in HOOKS if name.startswith("register_")} == KINDS_OF_HOOKS
    assert set(load("").registries) == set(KINDS)


def test_every_implementation_is_of_a_hook_there_is():
    assert used_by_plugins() <= set(HOOKS)


def test_every_hook_is_used_by_what_comes_with_maisi():
    # presets and commands of maisi itself are files and functions beside these, and nobody of its own listens
    for_others = {"register_presets", "register_commands", "on_event", "finish_sample"}
    assert set(HOOKS) - used_by_plugins() == for_others
    texts = [path.read_text("utf-8") for path in (ROOT / "maisi_cli").rglob("*.py") if path.name != "plugins.py"]
    for name in HOOKS:
        call = f'.registry("{name.removeprefix("register_")}")' if name in KINDS_OF_HOOKS else f".hook.{name}("
        assert any(call in text for text in texts), f"nothing asks for what {name} gives"


def test_what_comes_with_maisi_can_be_loaded():
    made = load("")
    for kind, registry in made.registries.items():
        for entry in registry:
            assert entry.owner == "maisi"
            if isinstance(entry.target, str):
                assert callable(registry.get(entry.name)), (kind, entry.name)
                assert entry.summary, (kind, entry.name)
            elif kind in ("models", "labels"):
                assert entry.target.is_file(), (kind, entry.name)
            else:
                assert kind == "modalities"


class Everything:
    """A plugin that implements every hook of registration with one thing, and listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @hookimpl
    def on_event(self, event: Any) -> None:
        self.heard.append(event)

    @hookimpl
    def finish_sample(self, sample: Any, folder: Path) -> dict[str, Any]:
        return {"id": sample, "folder": str(folder)}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> tuple[Plugins, Everything]:
    def implement(kind: str) -> Any:
        def register_one(self: Any, register: Any) -> None:
            register(f"a {kind}", "json:loads", summary=kind)

        register_one.__name__ = f"register_{kind}"
        return hookimpl(register_one)

    whole = type("Whole", (Everything,), {f"register_{kind}": implement(kind) for kind in KINDS})()
    loaded = load("", extra={"whole": whole})
    monkeypatch.setattr(plugins, "plugins", lambda: loaded)
    return loaded, whole


def test_a_plugin_may_implement_every_hook(everything):
    loaded, _ = everything
    for kind in KINDS:
        entry = loaded.registry(kind).entry(f"a {kind}")
        assert (entry.owner, entry.summary) == ("whole", kind)
    (info,) = [info for info in loaded.infos if info.name == "whole"]
    assert info.adds == (*(f"{word} a {kind}" for kind, (word, _) in KINDS.items()), "listener on_event", "listener finish_sample")


def test_listeners_are_called(everything):
    loaded, whole = everything
    note = Note(text="hello")
    loaded.manager.hook.on_event(event=note)
    assert whole.heard == [note]
    assert loaded.manager.hook.finish_sample(sample="s1", folder=Path("out")) == [{"id": "s1", "folder": "out"}]


def test_rooms_that_use_plugins_ask_for_registries_there_are():
    for room in (quality, synthesis):
        names = [node.args[0].value for node in ast.walk(ast.parse(inspect.getsource(room)))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "registry"]  # fmt: skip
        assert names
        assert set(names) <= set(KINDS)
