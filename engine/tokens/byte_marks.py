"""The characters that stand for bytes in byte-level tokens."""

import functools
from collections.abc import Mapping


@functools.cache
def byte_table() -> Mapping[str, int]:
    """Return the byte that each character of a byte-level token stands for, as GPT-2 wrote them.

    Printable bytes stand for themselves; the others have the characters from U+0100 on, in their order.

    >>> byte_table()["Ġ"], byte_table()["a"], len(byte_table())
    (32, 97, 256)
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
