"""Named things that plugins add: listed without importing anything, resolved when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from .errors import CannotRun, UsageError, unknown

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[T]):
    """One registered thing: its name, where it lives, who added it, and one line about it."""

    name: str
    target: str | T
    owner: str
    summary: str = ""


class Registry(Generic[T]):
    """Named things of one kind, such as samplers.

    `kind` is the word used in messages, `see` the command that lists them all.
    """

    def __init__(self, kind: str, *, see: str) -> None:
        self.kind = kind
        self.see = see
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, target: str | T, *, owner: str, summary: str = "") -> None:
        """Register `target`, an object or `"module:attribute"`. Raises `UsageError` for a name already taken."""
        taken = self._entries.get(name)
        if taken is not None:
            raise UsageError(
                f"two plugins register the {self.kind} {name!r}: {taken.owner} and {owner}",
                hint="uninstall one, or choose with MAISI_LOAD_PLUGINS=name,name",
            )
        self._entries[name] = Entry(name=name, target=target, owner=owner, summary=summary)

    def get(self, name: str) -> T:
        """Return the thing named `name`, importing it now.

        Raises `UsageError` with near matches, and `CannotRun` when its module fails to import.
        """
        entry = self.entry(name)
        if not isinstance(entry.target, str):
            return entry.target
        module, _, attribute = entry.target.partition(":")
        try:
            found: Any = getattr(import_module(module), attribute)
        except Exception as error:
            raise CannotRun(f"the {self.kind} {name!r} of {entry.owner} cannot be loaded from {entry.target}: {error}",
                            hint=f"install {entry.owner} again, or choose another {self.kind}") from error  # fmt: skip
        return found

    def discard(self, name: str) -> None:
        """Take a registration back, if there is one."""
        self._entries.pop(name, None)

    def entry(self, name: str) -> Entry[T]:
        """Return the registration of `name` without importing it. Raises `UsageError` with near matches."""
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries, see=self.see)
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)
