"""Sizes in bytes as people write them."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from mergemill.engine.errors import InputError

_SIZE = TypeAdapter(ByteSize)


def parse_size(text: str | int, *, what: str) -> int:
    """Return a number of bytes.

    >>> parse_size("5GB", what="--shard-size"), parse_size("512MiB", what="--memory"), parse_size(42, what="x")
    (5000000000, 536870912, 42)
    """
    try:
        size_bytes = int(_SIZE.validate_python(text))
    except ValidationError:
        size_bytes = 0
    if size_bytes <= 0:
        raise InputError(f"{what}: {text!r} is not a size; write bytes, or a number with MB, GB, MiB or GiB")
    return size_bytes


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
