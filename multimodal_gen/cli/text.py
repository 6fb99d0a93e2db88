"""Plain text and JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# C0 and C1 but for line breaks and tabs: what a terminal takes for orders.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


def harmless(text: str) -> str:
    """What somebody else has written, fit for a terminal: no escape sequence in it works."""
    return text.translate(_CONTROLS)


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(indent + line for line in lines)


def as_json(value: Any) -> str:
    """One JSON document; ASCII, so that any terminal and any pipe can carry it."""
    return json.dumps(value, indent=2)
