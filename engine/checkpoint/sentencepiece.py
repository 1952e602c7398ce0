"""The pieces of a SentencePiece model, in the order of their ids.

Source: google/sentencepiece, sentencepiece_model.proto (`ModelProto.pieces`, field 1, and of that `piece`, field 1);
Protocol Buffers: each field begins with its number and its kind.
"""

import struct
from collections.abc import Iterator

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # kinds
_PIECES = _PIECE = 1  # fields
_SCORE, _KIND = 2, 3
_NORMAL = 1  # the kind of a piece that says none


def parse_pieces(data: bytes) -> list[str] | None:
    """Return the pieces; None for what is no such model."""
    found = parse_scored(data)
    return None if found is None else [piece for piece, _, _ in found]


def parse_scored(data: bytes) -> list[tuple[str, float, int]] | None:
    """Return each piece with its score and its kind, a number of the format; None for what is no such model."""
    try:
        found = [_read_piece(message) for number, message in iterate_fields(data) if number == _PIECES]
    except (ValueError, IndexError):
        return None
    pieces = [piece for piece in found if piece is not None]
    return pieces if pieces and len(pieces) == len(found) else None


def _read_piece(message: bytes) -> tuple[str, float, int] | None:
    piece, score, kind = None, 0.0, _NORMAL
    for number, value in iterate_fields(message):
        if number == _PIECE and piece is None:
            piece = value.decode()
        elif number == _SCORE and len(value) == struct.calcsize("<f"):
            (score,) = struct.unpack("<f", value)
        elif number == _KIND:
            kind = int.from_bytes(value, "little")
    return None if piece is None else (piece, score, kind)


def iterate_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each field, numbers too as such. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        tag, at = _read_number(data, at)
        kind = tag & 7
        size = {_EIGHT: 8, _FOUR: 4}.get(kind, 0)
        if kind == _VARINT:
            value, at = _read_number(data, at)
            yield tag >> 3, value.to_bytes(10, "little")
            continue
        if kind == _LENGTH:
            size, at = _read_number(data, at)
        elif not size:
            raise ValueError(f"no kind of field: {kind}")
        if at + size > len(data):
            raise ValueError("a field goes beyond the end")
        yield tag >> 3, data[at : at + size]
        at += size


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    while shift < 64:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
    raise ValueError("a number of more than ten bytes")
