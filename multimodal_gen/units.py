"""Sizes of memory as people write and read them: `12GB`, `500 MB`, `1.5GiB`."""

from __future__ import annotations

import re

# Decimal units as on the box of a GPU, binary ones as kernels and containers count.
UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40},
}
LARGEST = 1 << 60

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,5})")
_BY_NAME = {name.lower(): factor for name, factor in UNITS.items()}


def parse_size(value: object) -> int:
    """Bytes from a text with a unit, or from a whole number of bytes. Raises: ValueError saying what is wrong."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _bounded(value)
    if not isinstance(value, str):
        raise ValueError("a size is a text like 12GB, or a whole number of bytes")
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError("a size is a number and a unit, as in 12GB, 500 MB or 1.5GiB")
    number, unit = found.groups()
    if not unit and float(number):
        raise ValueError(f"say which unit: {number}GB or {number}MB")
    factor = _BY_NAME.get(unit.lower(), 1 if not unit else 0)
    if not factor:
        raise ValueError(f"there is no unit {unit}; use one of {', '.join(UNITS)}")
    whole, _, fraction = number.partition(".")
    # Through integers: a float has no room for every byte of a large machine.
    return _bounded(int(whole) * factor + int(fraction or 0) * factor // 10 ** len(fraction))


def size(count: float) -> str:
    """A number of bytes for people: `1.5 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def at_least(count: int) -> str:
    """A size that a flag takes, rounded up so that `count` bytes fit: `1.6GB`."""
    unit = next((unit for unit in ("GB", "MB", "kB") if count >= UNITS[unit]), "B")
    tenths = -(-count * 10 // UNITS[unit])
    return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"


def _bounded(count: int) -> int:
    if not 0 <= count <= LARGEST:
        raise ValueError("a size is at least 0 and at most 1048576TiB")
    return count
