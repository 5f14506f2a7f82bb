"""Ten lines of HTML writing: text is escaped, markup is marked."""

from __future__ import annotations

import html
import json
import re
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Escaped, unless it is markup."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def breakable(name: str) -> Markup:
    """A name that may go on in the next line behind the marks between its parts."""
    return Markup(re.sub("([_./=,-])", r"\1<wbr>", text(name)))


def join(parts: object) -> Markup:
    """Many pieces as one."""
    return Markup("".join(text(part) for part in parts))  # type: ignore[attr-defined]


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` and `data_x` become `class` and `data-x`; a true one stands alone, a false or `None` one goes."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
    if name in ("img", "input", "br"):
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
