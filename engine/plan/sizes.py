"""Sizes in bytes as people write them.

Not by pydantic's ByteSize (2026-11-29): it would save ten lines, and takes what follows a size for nothing
(``5GB, 3`` and ``5GB/s`` are 5 GB, ``1.5.3`` and ``1-2`` are one byte), reads bits, and takes 0. What both take, they
take for the same, which a test holds.
"""

import re

from mergemill.engine.errors import InputError

LEAST_SHARD_BYTES = 10**6  # that a text without a unit may ask for
_BILLIONS = re.compile(r"\s*(\d+|\d*\.\d+)\s*B\s*", re.ASCII)
_OPTION_UNITS = ((1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"), (1 << 40, "TiB"))
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


def read_shard_size(given: str | int) -> tuple[str | int, str]:
    """Return the size that a shard may have, and a note where it is read otherwise than bytes are.

    A number is bytes. As text, ``5B`` is five billion, as in mergekit; and a few bytes without a unit are refused with
    what was probably meant, since they would be a file for each tensor (decided 2026-11-29: who writes KB means it).

    >>> read_shard_size("5GB"), read_shard_size("tensor"), read_shard_size(70_000)
    (('5GB', ''), ('tensor', ''), (70000, ''))
    """
    if isinstance(given, int) or given == "tensor":
        return given, ""
    if billions := _BILLIONS.fullmatch(given):
        size = f"{billions[1]}GB"
        return size, f"--shard-size {given} is read as {size}, as in mergekit: a B is a billion bytes"
    if (number := given.strip()).isdecimal() and 0 < int(number) < LEAST_SHARD_BYTES:
        raise InputError(
            f"--shard-size: {number} is {int(number):,} bytes, too few for a file; did you mean "
            f"{number}GB or {number}MB? One file a tensor is 'tensor'"
        )
    return given, ""


def _parse(text: str) -> int:
    """Return a number of bytes, 0 for what is no size."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return 0
    number, letter, binary = found.groups()
    power = " kmgtpe".index(letter.lower()) if letter else 0
    unit = (1024 if binary else 1000) ** power
    return int(number) * unit if number.isdecimal() else int(float(number) * unit)


def say_enough(size_bytes: int) -> str:
    """Return a size that can be given to an option, rounded up to a tenth: never less than is needed.

    >>> say_enough(2_900_000_001), say_enough(1 << 30), say_enough(700)
    ('2.8GiB', '1GiB', '1KiB')
    """
    unit_bytes, unit = max((size, unit) for size, unit in _OPTION_UNITS if size <= max(size_bytes, 1024))
    tenths = -(-size_bytes * 10 // unit_bytes)
    return f"{tenths // 10}.{tenths % 10}{unit}".replace(f".0{unit}", unit) if size_bytes >= 1024 else f"1{unit}"


def say_count(number: int, noun: str) -> str:
    """Return a number of things.

    >>> say_count(1, "part"), say_count(2000, "part")
    ('1 part', '2,000 parts')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
