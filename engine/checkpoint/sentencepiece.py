"""The pieces of a SentencePiece model, in the order of their ids.

Source: google/sentencepiece, sentencepiece_model.proto (`ModelProto.pieces`, field 1, and of that `piece`, field 1);
Protocol Buffers: each field begins with its number and its kind.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # kinds
_PIECES = _PIECE = 1  # fields
_SCORE, _KIND = 2, 3
_NORMAL = 1  # the kind of a piece that says none
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds that no pair of pieces makes


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


def list_merges(pieces: Sequence[tuple[str, float, int]], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Return the pairs of pieces that make pieces, those of the highest score first.

    Of one piece's, those whose first part is longer come first, as where transformers makes them.
    """
    found: list[tuple[float, list[str]]] = []
    for text, score, kind in pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue
        cuts = [(text[:cut], text[cut:]) for cut in range(len(text) - 1, 0, -1)]
        found += [(score, [*pair]) for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    # The same score is that of several pieces too, in files that were made by hand or joined.
    return [pair for _, pair in sorted(found, key=lambda each: (-each[0], -len(each[1][0]), -len(each[1][1])))]


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
