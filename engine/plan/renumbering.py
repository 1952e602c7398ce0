"""Each input's embedding and head in the order of the output's vocabulary.

A tensor with a row a token is changed where a slot is filled: there it is known which models are its inputs, and what
each is offered as, with adapters put on and dequantised.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mergemill.engine.checkpoint.family import Family, is_vocabulary
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.slots import Slot
from mergemill.engine.plan.values import OutputTensor, OutputTokens, TokenRow
from mergemill.engine.recipe.vocabulary import ModelRow, Token, Tokenizer, ZeroRow
from mergemill.engine.tensors.row_maps import make_row_map
from mergemill.engine.tokens import Vocabulary
from mergemill.engine.tokens.joining import Joined, warn_of_joined
from mergemill.engine.tokens.placing import (
    FORCED,
    NOBODY,
    NONE,
    PADDING,
    TAKEN,
    ZERO,
    Fixed,
    Holders,
    Ints,
    Placed,
    find_input_rows,
    limit_ids,
    narrow,
    place_rows,
)

if TYPE_CHECKING:
    from mergemill.engine.plan.missing_rows import MissingRows

MOST_TOKENS = 5  # that a warning names


@dataclass(frozen=True, slots=True, eq=False)
class Renumbering:
    """How tensors with a row a token become those of the output's vocabulary."""

    joined: Joined
    vocabularies: Mapping[str, Vocabulary]  # by model: those that have one, without tokens that have no row
    ids: Mapping[str, Ints]  # by model: its own id of each of the output's
    settings: Tokenizer
    family: Family
    embedding: str  # the name of the source's
    rows: int  # of it
    where: str
    beyond: tuple[str, ...] = ()  # tokens of the source that have no row
    seed: int = 0  # of rows that are drawn
    told: list[TokenRow] = field(default_factory=list)  # filled as slots are: what becomes of tokens, for people

    @property
    def union(self) -> bool:
        """Whether the output has the tokens of all models."""
        return self.settings.source == "union"

    def count_rows(self, own: int) -> int:
        """Return how many rows a tensor has in the output, of which the source has `own`."""
        multiple = self.settings.pad_to_multiple_of
        return -(-self.joined.size // multiple) * multiple if multiple else max(self.joined.size, own)

    def renumber(self, slot: Slot, offers: Mapping[str, Offers], ledger: Ledger) -> Mapping[str, Offers]:
        """Return the offers with those for a slot in the output's vocabulary, where it is one with a row a token."""
        names = {each.model: each.tensor for each in slot.candidates}
        names |= {each.delta_base: each.tensor for each in slot.candidates if each.delta_base is not None}
        inputs = {model: name for model, name in names.items() if name in offers[model]}
        first = next(iter(inputs.items()), None)
        if first is None or not is_vocabulary(first[1], self.family):
            return offers
        length = offers[first[0]][first[1]].shape[1:]
        others = {model: first[1] for model in self.ids if model not in inputs and first[1] in offers[model]}
        found = {model: offers[model][name] for model, name in {**inputs, **others}.items()}
        if any(found[model].shape[1:] != length for model in inputs):
            return offers  # of which the shapes are told to differ
        holders = self._find_holders({m: each for m, each in found.items() if each.shape[1:] == length}, inputs, slot)
        return self._renumber(slot.site.tensor, holders, found, names, offers, ledger)

    def _find_holders(
        self, found: Mapping[str, Offer], inputs: Mapping[str, str], slot: Slot
    ) -> tuple[list[str], Holders]:
        models = list(found)
        rows = tuple(found[model].shape[0] for model in models)
        source = models.index(self.joined.source) if self.joined.source in models else None
        total = self.count_rows(self.rows if source is None else rows[source])
        held = tuple(limit_ids(self.ids[model], count, total) for model, count in zip(models, rows, strict=True))
        base = models.index(slot.base) if slot.base in models else None
        return models, Holders(rows, held, tuple(models.index(model) for model in inputs), base, source)

    def _renumber(
        self,
        tensor: str,
        known: tuple[list[str], Holders],
        found: Mapping[str, Offer],
        names: Mapping[str, str],
        offers: Mapping[str, Offers],
        ledger: Ledger,
    ) -> Mapping[str, Offers]:
        from mergemill.engine.tensors.rows import map_rows  # which only joined vocabularies need

        models, holders = known
        made = self._start_making(tensor, known, found)
        tokens = np.sort(np.fromiter(self.joined.ids.values(), np.int64, len(self.joined.ids)))
        fixed = {
            self.joined.ids[text]: self._fix(text, token, tensor, models, holders)
            for text, token in self.settings.tokens.items()
            if token.source is not None
        }
        placed = place_rows(holders, tokens, fixed, padded=bool(self.settings.pad_to_multiple_of))
        self.told.extend(self._tell(tensor, models, holders, placed, made))
        changed = dict(offers)
        for which in holders.inputs:
            wanted = find_input_rows(holders, placed, which)
            parts = () if made is None else made.find_parts(placed, which)
            for part in parts:
                wanted[part.numbers] = ZERO
            used, rows, several = narrow(holders, placed, wanted, which)
            model, offer = models[which], found[models[which]]
            expressions = [found[models[each]].expression for each in used]
            expression = map_rows(expressions, make_row_map(rows, several), offer.dtype)
            if made is not None:
                expression = made.make(expression, parts, which)
            used = (*used, *(part.donor for part in parts))
            changed[model] = {**offers[model], names[model]: offer._replace(expression=expression)}
            for other in (models[each] for each in used if each not in holders.inputs):
                for use in found[other].uses:
                    ledger.use(other, use, "copied")
        return changed

    def _start_making(
        self, tensor: str, known: tuple[list[str], Holders], found: Mapping[str, Offer]
    ) -> "MissingRows | None":
        """Return how rows of tokens that inputs lack are made; None where they are taken from other models."""
        if self.settings.missing is None or len(found[known[0][0]].shape) != 2:
            return None
        # with the approximations, which few merges need
        from mergemill.engine.plan.missing_rows import JoinedWords, start_making

        words = JoinedWords(self.joined, self.vocabularies, self.family, self.seed, self.where)
        return start_making(words, self.settings.missing, tensor, *known, found)

    def _fix(self, text: str, token: Token, tensor: str, models: Sequence[str], holders: Holders) -> Fixed:
        """Return the row that the recipe gives a token; `PlanError` where nobody has it."""
        if isinstance(token.source, ZeroRow):
            return Fixed(None, 0, bool(token.force))
        asked = token.source.model if isinstance(token.source, ModelRow) else token.source
        model, where = str(asked), f"{self.where}: tokens: {text!r}"
        if model not in models:
            raise PlanError(
                f"{where}: {model} has no tensor in the place of {tensor} with rows of that length, so none for it"
            )
        holder = models.index(model)
        wanted = token.source.token if isinstance(token.source, ModelRow) else text
        row = token.source.token_id if isinstance(token.source, ModelRow) and wanted is None else None
        if row is None:
            row = self._find_id(str(wanted), model, where)
        if row >= holders.rows[holder]:
            raise PlanError(f"{where}: {model} has {holders.rows[holder]} rows in {tensor}, none for the id {row}")
        return Fixed(holder, row, bool(token.force))

    def _find_id(self, token: str, model: str, where: str) -> int:
        vocabulary = self.vocabularies.get(model, self.vocabularies[self.joined.source])
        if token in vocabulary.ids:
            return vocabulary.ids[token]
        alike = [each for each in vocabulary.ids if abs(len(each) - len(token)) < 8]
        near = difflib.get_close_matches(token, alike, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"{where}: {model} has no token {token!r} with a row{hint}")

    def _tell(
        self, tensor: str, models: Sequence[str], holders: Holders, placed: Placed, made: "MissingRows | None"
    ) -> Iterator[TokenRow]:
        """Yield the tokens that some input lacks, and those whose row the recipe gives."""
        lacking = np.zeros(len(placed.common), np.bool_)
        for which in holders.inputs:
            lacking |= holders.held[which] == NONE
        lacking |= placed.forced
        lacking &= placed.why != PADDING
        texts = {number: text for text, number in self.joined.ids.items()}
        starts = np.array(holders.starts)
        for number in np.flatnonzero(lacking).tolist():
            row, why = int(placed.common[number]), int(placed.why[number])
            who: tuple[tuple[str, int], ...] = ()
            members = placed.several[-3 - row] if row <= -3 else (row,) if row >= 0 else ()
            for member in members:
                holder = int(np.searchsorted(starts, member, "right") - 1)
                who += ((models[holder], member - int(starts[holder])),)
            without = tuple(models[i] for i in holders.inputs if holders.held[i][number] == NONE)
            how = "" if made is None or why not in TAKEN else made.method
            yield TokenRow(tensor, texts[number], number, why == FORCED, why == NOBODY, who, without, how)

    def expect(self, donor: str, offers: Mapping[str, Offers], tensors: Sequence[OutputTensor]) -> Mapping[str, Offers]:
        """Return the offers with those of the donor as the config that is written makes loaders expect them."""
        made = {tensor.name: tensor.expression for tensor in tensors if is_vocabulary(tensor.name, self.family)}
        own = offers[donor]
        changed = {name: own[name]._replace(expression=each) for name, each in made.items() if name in own}
        return {**offers, donor: {**own, **changed}}

    def describe(self) -> OutputTokens:
        """Return what becomes of tokens, for people."""
        joined = self.joined
        added = tuple((token, joined.ids[token]) for token in (*joined.regular, *joined.new))
        marked = tuple((token, joined.ids[token], model) for token, model in joined.marked.items())
        return OutputTokens(joined.source, added, marked, tuple(self.told))

    def warn(self) -> Iterator[str]:
        """Yield what is not as one might think, once all slots are filled."""
        source, joined = self.joined.source, self.joined
        if self.beyond:
            yield (
                f"{self.where}: {list_tokens(self.beyond)} of {source} have ids past the {self.rows} rows of its "
                f"embedding; the output has them no more than it"
            )
        for told in warn_of_joined(joined, self.vocabularies):
            yield f"{self.where}: {told}"
        nobody = list(dict.fromkeys(each.token for each in self.told if each.nobody))
        if nobody:
            yield f"{self.where}: no model has a row for {list_tokens(nobody)}; the output's are zeros"


def list_tokens(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - MOST_TOKENS:,} more" if len(tokens) > MOST_TOKENS else ""
    return ", ".join(repr(token[:40]) for token in tokens[:MOST_TOKENS]) + more
