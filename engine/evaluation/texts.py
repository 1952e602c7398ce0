"""Texts as tokens: windows of one text, or examples of inputs and outputs; and which of their tokens are scored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import InputError
from mergemill.engine.tensors.lazy import Tensor, torch

WINDOW = 512


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Token ids in rows, the shorter ones filled up at their ends, which no causal model looks at."""

    ids: Tensor
    """[rows, length], int64."""
    scored: Tensor
    """[rows, length], bool: of which tokens the loss counts; never of a row's first."""
    text_bytes: int
    """Of the text that they stand for."""

    def take(self, rows: slice) -> "ScoredTokens":
        """Return some of the rows."""
        return ScoredTokens(self.ids[rows], self.scored[rows], self.text_bytes)


def make_windows(tokenizer: Any, text: str, *, window: int, stride: int, windows: int | None) -> ScoredTokens:
    """Return a text's windows of `window` ids, every `stride`; with `windows`, so many at equal distances.

    Each begins with BOS where the tokenizer adds one by itself, beside its ids. Of each those ids are scored that no
    window before has scored and that have one before them.
    """
    if window < 2 or not 1 <= stride <= window:
        raise InputError(
            f"window is {window} and stride {stride}; a window has 2 ids at least, a stride no more than it"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids: list[int] = encoded["input_ids"]
    begins = find_begin(tokenizer)
    starts = [start for start in range(0, max(1, len(ids)), stride) if start == 0 or start + window - stride < len(ids)]
    starts = [start for start in starts if len(ids) - start >= 2]
    if not starts:
        raise InputError(f"the text has {len(ids)} tokens; two at least are needed")
    chosen = range(len(starts))
    if windows is not None and windows < len(starts):
        chosen = [place * len(starts) // windows for place in range(windows)]  # type: ignore[assignment]
    rows, firsts, size_bytes = [], [], 0
    for place in chosen:
        start, overlap = starts[place], window - stride if starts[place] else 0
        rows.append([*begins, *ids[start : start + window]])
        firsts.append(max(1, len(begins) + overlap))
        size_bytes += _count_bytes(tokenizer, text, encoded, start + overlap, min(start + window, len(ids)))
    return _fill_up(rows, firsts, len(text.encode()) if len(chosen) == len(starts) else size_bytes)


def make_examples(tokenizer: Any, lines: Sequence[tuple[str, str]]) -> ScoredTokens:
    """Return rows of inputs, as the tokenizer encodes them, and outputs, of which tokens and the end are scored."""
    rows, firsts, size_bytes = [], [], 0
    for given, output in lines:
        before = tokenizer(given, verbose=False)["input_ids"] or find_begin(tokenizer)
        after = tokenizer(output, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no token for the end, which an example ends with")
        rows.append([*before, *after, tokenizer.eos_token_id])
        firsts.append(max(1, len(before)))
        size_bytes += len(output.encode())
    return _fill_up(rows, firsts, size_bytes)


def find_begin(tokenizer: Any) -> list[int]:
    """Return the BOS that a tokenizer puts before each text by itself; nothing where it does not."""
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def read_text(path: str | Path) -> str:
    """Return a text file's text; `InputError` where it is none."""
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start} cannot be decoded") from None


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """Return the examples of a file with a JSON object ``{input, output}`` a line."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            given, output = example["input"], example["output"]
        except (ValueError, KeyError, TypeError):
            given = output = None
        if not isinstance(given, str) or not isinstance(output, str):
            raise InputError(f'{path}:{number}: is no example; each line is {{"input": "…", "output": "…"}}')
        found.append((given, output))
    if not found:
        raise InputError(f"{path}: holds no example")
    return found


def _count_bytes(tokenizer: Any, text: str, encoded: Any, start: int, stop: int) -> int:
    """Return the bytes of the text that tokens stand for."""
    if tokenizer.is_fast:
        offsets = encoded["offset_mapping"]
        return len(text[offsets[start][0] : offsets[stop - 1][1]].encode())
    return len(tokenizer.decode(encoded["input_ids"][start:stop]).encode())


def _fill_up(rows: Sequence[Sequence[int]], firsts: Sequence[int], size_bytes: int) -> ScoredTokens:
    length = max(map(len, rows))
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    scored = torch.zeros((len(rows), length), dtype=torch.bool)
    for place, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        scored[place, first : len(row)] = True
    return ScoredTokens(ids, scored, size_bytes)
