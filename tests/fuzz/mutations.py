"""Other bytes from bytes: cut, overwritten, repeated, and, where they are JSON, with other values in it."""

import json
import random
from collections.abc import Callable
from typing import Any

TEXTS = ("", "a", "../../x", "/etc/passwd", "\ud800", "\x00", "\x1b[2J", "model.layers.99999999999.w", "1" * 400)
NUMBERS = (0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**64), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"))
PLAIN = (None, True, False, [], {}, [[]], *TEXTS, *NUMBERS)
PIECES = (
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xf0\x9f\x98\x80",
    b"\r",
    b"\x00",
    b"\x85",
    b"[" * 50,
    b'{"a":' * 50,
    b"&a ",
)
DEPTH = (10, 400, 900, 2000)


def mutate(data: bytes, seed: int) -> bytes:
    """Return other bytes, the same for the same seed."""
    stream = random.Random(seed)
    for _ in range(stream.choice((1, 1, 1, 2, 4))):
        data = stream.choice(WAYS)(data, stream)
    return data


def change_json(data: bytes, stream: random.Random) -> bytes:
    """Change a value, a key or the depth of JSON: of all of it, of a line, or of what follows a length."""
    start = 8 if data[8:9] == b"{" and data[:1] != b"{" else 0
    lines = data[start:].split(b"\n") if b"\n{" in data else [data[start:]]
    at = stream.randrange(len(lines))
    try:
        found = json.loads(lines[at])
    except (ValueError, RecursionError):
        return change_bytes(data, stream)
    lines[at] = _dump(_change(found, stream, stream.randrange(6)), stream)
    text = b"\n".join(lines)
    return (len(text).to_bytes(8, "little") if start else b"") + text


def change_bytes(data: bytes, stream: random.Random) -> bytes:
    """Cut, overwrite or repeat."""
    low, high = sorted(stream.randrange(len(data) + 1) for _ in range(2))
    kind = stream.randrange(6)
    if kind == 0:
        return data[:low]
    if kind == 1:
        return data[:low] + data[high:]
    if kind == 2:
        return data[:high] + data[low:high] * stream.choice((1, 2, 20)) + data[high:]
    if kind == 3:
        return data[:low] + stream.choice(PIECES) + data[low:]
    if kind == 4:
        return data[:low] + stream.randbytes(stream.choice((1, 2, 8))) + data[low + 1 :]
    return data[:low] + str(stream.choice(PLAIN)).encode(errors="surrogatepass") + data[high:]


def change_lines(data: bytes, stream: random.Random) -> bytes:
    """Move, repeat, drop or indent a line, as YAML goes by them."""
    lines = data.split(b"\n")
    at, to = stream.randrange(len(lines)), stream.randrange(len(lines))
    line = lines[at] if stream.random() < 0.3 else lines.pop(at)
    if stream.random() < 0.8:
        lines.insert(to, stream.choice((b"", b" ", b"  ", b"- ", b"? ", b"<<: ", b"!!int ", b"&a ", b"*a ")) + line)
    return b"\n".join(lines)


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (change_json, change_json, change_bytes, change_lines)


def _change(found: Any, stream: random.Random, depth: int) -> Any:
    """Return a value with one within it changed, no deeper than `depth`."""
    if isinstance(found, dict) and found and depth:
        key = stream.choice(list(found))
        kind = stream.randrange(8)
        if kind == 0:
            return {name: value for name, value in found.items() if name != key}
        if kind == 1:
            return {**found, stream.choice(TEXTS): found[key]}
        return {**found, key: _change(found[key], stream, depth - 1)}
    if isinstance(found, list) and found and depth:
        at = stream.randrange(len(found))
        kind = stream.randrange(8)
        if kind == 0:
            return found[:at] + found[at + 1 :]
        if kind == 1:
            return [*found, found[at]]
        return [*found[:at], _change(found[at], stream, depth - 1), *found[at + 1 :]]
    if isinstance(found, int) and stream.random() < 0.5:
        return found + stream.choice((-1, 1, 7, 1 << 20))
    return stream.choice(PLAIN)


def _dump(value: Any, stream: random.Random) -> bytes:
    text = json.dumps(value)
    if stream.random() < 0.03:
        deep = stream.choice(DEPTH)
        text = text.replace("null", "[" * deep + "]" * deep, 1).replace("{}", '{"a":' * deep + "1" + "}" * deep, 1)
    return text.encode()
