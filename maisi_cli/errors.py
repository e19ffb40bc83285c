"""What can go wrong, each kind with its exit code; the shell turns one into a single line on stderr."""

from __future__ import annotations

from collections.abc import Iterable


class MaisiError(Exception):
    """Something that the user can act on.

    `message` says what is wrong and what is allowed; `hint` is the next command or change, without a full stop.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Rejected(MaisiError):
    """The work was done and the answer is no: a quality check failed, some samples are missing (exit code 1)."""


class UsageError(MaisiError):
    """Wrong use, preset, configuration or input file (exit code 2)."""

    exit_code = 2


class CannotRun(MaisiError):
    """This machine cannot: memory, CUDA, missing weights, licence not accepted (exit code 3)."""

    exit_code = 3


def nearest(wanted: str, known: Iterable[str], *, at_most: int = 3) -> list[str]:
    """Return up to `at_most` of the `known` words closest to `wanted`, best first."""
    from difflib import get_close_matches

    words = list(known)
    folded = {word.casefold(): word for word in words}
    found = get_close_matches(wanted.casefold(), folded, n=at_most, cutoff=0.6)
    inside = [word for word in words if wanted.casefold() in word.casefold()]
    return list(dict.fromkeys([*(folded[word] for word in found), *inside]))[:at_most]


def unknown(kind: str, wanted: str, known: Iterable[str], *, see: str) -> UsageError:
    """Return the error for a name that is not known: near matches when there are any, and where all are listed."""
    close = nearest(wanted, known)
    hint = f"did you mean {' or '.join(repr(word) for word in close)}? " if close else ""
    return UsageError(f"there is no {kind} named {wanted!r}", hint=f"{hint}see  {see}".strip())
