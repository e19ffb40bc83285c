"""HTML as text that knows what it is: everything that is not `Html` is escaped where it enters an element."""

from __future__ import annotations

from html import escape


class Html(str):
    """Text that is markup already; any other text is escaped."""

    __slots__ = ()


VOID = frozenset({"img"})


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element: content and attributes are escaped unless they are `Html`, and None is left out.

    A trailing underscore of an attribute is dropped, others become hyphens; True is an attribute without a value.
    """
    named = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{named}>" if name in VOID else f"<{name}{named}>{join(*content)}</{name}>")


def join(*content: object) -> Html:
    """Return contents one after another, escaped unless they are `Html`; None is left out."""
    return Html("".join(each if isinstance(each, Html) else escape(str(each)) for each in content if each is not None))
