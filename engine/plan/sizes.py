"""Sizes in bytes as people write them."""

import re

from mergemill.engine.errors import InputError

_SIZE = re.compile(r"\s*(\d+|\d*\.\d+)\s*(?:([kmgtpe])(i?))?b?\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str | int, *, what: str) -> int:
    """Return a number of bytes; capitals do not matter, and the B may be left out.

    >>> parse_size("5GB", what="--shard-size"), parse_size("1.5 MiB", what="--memory"), parse_size(42, what="x")
    (5000000000, 1572864, 42)
    """
    size_bytes = text if isinstance(text, int) else _parse(text)
    if size_bytes <= 0:
        raise InputError(f"{what}: {text!r} is not a size; write bytes, or a number with MB, GB, MiB or GiB")
    return size_bytes


def _parse(text: str) -> int:
    """Return a number of bytes, 0 for what is no size."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return 0
    number, letter, binary = found.groups()
    power = " kmgtpe".index(letter.lower()) if letter else 0
    unit = (1024 if binary else 1000) ** power
    return int(number) * unit if number.isdecimal() else int(float(number) * unit)


def format_size(size_bytes: float) -> str:
    """Return a size for people, with binary units.

    >>> format_size(0), format_size(1536), format_size(5 * 2**30)
    ('0 B', '1.5 KiB', '5.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
