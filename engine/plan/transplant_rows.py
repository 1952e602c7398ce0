"""What becomes of each row when a model gets the vocabulary of another: whose row it is, or that it is made."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mergemill.engine.tensors.row_maps import ZERO, RowMap, make_row_map
from mergemill.engine.tokens import Vocabulary
from mergemill.engine.tokens.matching import Matches
from mergemill.engine.tokens.spelling import spell_tokens
from mergemill.engine.transplants.changes import Changes, make_changes

KINDS = ("same", "role", "byte", "prefix", "approximated", "zero")
SAID = {
    "same": "the same",
    "role": "by role",
    "byte": "by byte",
    "prefix": "by prefix",
    "approximated": "approximated",
    "zero": "zero",
}


@dataclass(frozen=True, slots=True)
class Sides:
    """Two vocabularies, each as far as its model has rows, and how many these are."""

    model: Vocabulary
    donor: Vocabulary
    model_rows: int
    donor_rows: int
    rows: int  # of the output
    model_bad: frozenset[int] = frozenset()  # rows that were hardly trained
    donor_bad: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a token."""

    kind: str  # one of `KINDS`
    row: int = ZERO  # of the model


def find_fates(sides: Sides, matches: Matches, *, byte: bool, prefix: bool) -> Mapping[int, Fate]:
    """Return what becomes of each id of the donor's tokens that the output has."""
    looked = [("same", matches.same), ("role", matches.role)]
    looked += [("byte", matches.byte)] if byte else []
    looked += [("prefix", matches.prefix)] if prefix else []
    return {number: _find(number, looked, sides) for number in sorted(sides.donor.ids.values()) if number < sides.rows}


def _find(number: int, looked: list[tuple[str, Mapping[int, int]]], sides: Sides) -> Fate:
    for kind, table in looked:
        if number in table:
            bad = (number in sides.donor_bad) + (table[number] in sides.model_bad)
            return Fate(kind, table[number]) if not bad else Fate("approximated" if bad == 1 else "zero")
    return Fate("approximated" if number < sides.donor_rows else "zero")


def count_fates(fates: Mapping[int, Fate]) -> str:
    """Return how many tokens there are of each kind, in words."""
    counts = Counter(fate.kind for fate in fates.values())
    return ", ".join(f"{counts[kind]:,} {SAID[kind]}" for kind in KINDS if counts[kind])


def make_rows(sides: Sides, matches: Matches, fates: Mapping[int, Fate], *, spelt: bool, where: str) -> "Outcome":
    """Return the rows that are copied, and what becomes of the others; spelt: whether these are spelt by the model."""
    rows = np.full(sides.rows, ZERO, np.int32)
    for number, fate in fates.items():
        rows[number] = fate.row
    new = [number for number, fate in fates.items() if fate.kind == "approximated"]
    names = {number: token for token, number in sides.donor.ids.items()}
    spellings = spell_tokens([names[number] for number in new], sides.donor, sides.model, where=where) if spelt else []
    kept = [[each for each in spelling if each < sides.model_rows] for spelling in spellings] or [[] for _ in new]
    changes = make_changes(
        new=new,
        means=sorted({*range(sides.rows)} - fates.keys()),
        shared=[
            (donor, model)
            for donor, model in matches.shared.items()
            if donor < sides.donor_rows and donor not in sides.donor_bad and model not in sides.model_bad
        ],
        tokens=sorted({*sides.model.ids.values()}),
        spellings=kept,
    )
    return Outcome(make_row_map(rows), changes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rows of the output."""

    copied: RowMap  # of the model's rows
    changes: Changes
