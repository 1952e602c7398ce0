"""The pieces of a SentencePiece model, in the order of their ids.

Source: google/sentencepiece, sentencepiece_model.proto (`ModelProto.pieces`, field 1, and of that `piece`, field 1);
Protocol Buffers: each field begins with its number and its kind.
"""

from collections.abc import Iterator

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # kinds
_PIECES = _PIECE = 1  # fields


def parse_pieces(data: bytes) -> list[str] | None:
    """Return the pieces; None for what is no such model."""
    try:
        found = [_read_piece(message) for number, message in _iterate_fields(data) if number == _PIECES]
    except (ValueError, IndexError):
        return None
    pieces = [piece for piece in found if piece is not None]
    return pieces if pieces and len(pieces) == len(found) else None


def _read_piece(message: bytes) -> str | None:
    return next((value.decode() for number, value in _iterate_fields(message) if number == _PIECE), None)


def _iterate_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each field; of numbers, none. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        tag, at = _read_number(data, at)
        kind = tag & 7
        size = {_EIGHT: 8, _FOUR: 4}.get(kind, 0)
        if kind == _VARINT:
            _, at = _read_number(data, at)
        elif kind == _LENGTH:
            size, at = _read_number(data, at)
        elif not size:
            raise ValueError(f"no kind of field: {kind}")
        if at + size > len(data):
            raise ValueError("a field goes beyond the end")
        yield tag >> 3, data[at : at + size] if kind == _LENGTH else b""
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
