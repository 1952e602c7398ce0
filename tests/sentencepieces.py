"""A small vocabulary as SentencePiece has it: pieces with scores and kinds, trained on a few sentences."""

import functools
import json
import struct
from pathlib import Path

from trained import SENTENCES, train

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # kinds
SPECIAL = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}


@functools.cache
def make_pieces(size: int = 480) -> tuple[tuple[str, float, int], ...]:
    """Return the pieces in the order of their ids, the earlier merged ones with the higher scores."""
    model = json.loads(train("sentencepiece", list(SENTENCES.values()), size).to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merged = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(model["merges"])])}
    kinds = {text: SPECIAL.get(text, BYTE if text.startswith("<0x") else NORMAL) for text in vocabulary}
    return tuple(
        (text, merged.get(text, -1000.0 - place) if kinds[text] == NORMAL else 0.0, kinds[text])
        for place, text in enumerate(vocabulary)
    )


def write_model(path: Path) -> None:
    """Write a ``tokenizer.model`` of BPE, which leaves text as it is."""
    bodies = [
        _write(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])
        for text, score, kind in make_pieces()
    ]
    trainer, normalizer = bytes([3 << 3, 2]), bytes([3 << 3, 0])
    path.write_bytes(b"".join(_write(1, body) for body in bodies) + _write(2, trainer) + _write(3, normalizer))


def _write(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data
