"""Rows of tokens that an input of a merge lacks, made of its own rows as a transplant makes them (2026-11-30).

Another model's row stands in another space. So each input is given the row that its own embedding implies: the donor of
a token is the first of source, base and the recipe's models that has it, and what both have in common shows what the
donor's row is made of. Vectors, as a head's bias, and tokens whose row a recipe gives, are let be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mergemill.engine.checkpoint.family import Family, may_be_tied
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer
from mergemill.engine.plan.transplant_options import TransplantOptions, parse_options
from mergemill.engine.recipe.vocabulary import Missing
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tokens.joining import Joined
from mergemill.engine.tokens.placing import NONE, TAKEN, Holders, Ints, Placed
from mergemill.engine.tokens.reading import Vocabulary
from mergemill.engine.tokens.spelling import spell_tokens
from mergemill.engine.transplants.changes import make_changes
from mergemill.engine.transplants.matrices import Matrices
from mergemill.engine.transplants.methods import METHODS, Manner
from mergemill.engine.transplants.transplanted import transplant


@dataclass(frozen=True, slots=True, eq=False)
class JoinedWords:
    """A joined vocabulary, and those that it is joined from."""

    joined: Joined
    vocabularies: Mapping[str, Vocabulary]  # of models
    family: Family
    seed: int
    where: str  # the recipe, for errors


@dataclass(frozen=True, slots=True, eq=False)
class MissingPart:
    """New rows of one input that have one donor."""

    donor: int  # among the holders
    numbers: Ints  # ids of the output


@dataclass(frozen=True, slots=True, eq=False)
class MissingRows:
    """How rows of one tensor are made for the inputs that lack them."""

    words: JoinedWords
    tensor: str
    models: list[str]  # the holders
    holders: Holders
    found: Mapping[str, Offer]  # of each holder
    options: TransplantOptions

    @property
    def method(self) -> str:
        """By which rows are made."""
        return self.options.method

    def find_parts(self, placed: Placed, which: int) -> tuple[MissingPart, ...]:
        """Return which rows an input lacks that another model has, by the model that shows what they are like."""
        left = (self.holders.held[which] == NONE) & np.isin(placed.why, TAKEN)
        parts = []
        for donor in self._order():
            numbers = np.flatnonzero(left & (self.holders.held[donor] != NONE))  # none of its own: those it has
            if len(numbers):
                parts.append(MissingPart(donor, numbers))
                left[numbers] = False
        return tuple(parts)

    def make(self, expression: Expression, parts: tuple[MissingPart, ...], which: int) -> Expression:
        """Return an input's rows with those that are made; `PlanError` where nothing can be made of what both have."""
        for part in parts:
            expression = self._make(expression, part, which)
        return expression

    def _order(self) -> list[int]:
        first = [each for each in (self.holders.source, self.holders.base) if each is not None]
        return [*dict.fromkeys([*first, *range(len(self.models))])]

    def _make(self, expression: Expression, part: MissingPart, which: int) -> Expression:
        options, method = self.options, METHODS[self.options.method]
        model, donor = (self.found[self.models[each]].expression for each in (which, part.donor))
        own, other = (self.holders.held[each] for each in (which, part.donor))
        shared = np.flatnonzero((own != NONE) & (other != NONE))
        where = f"{self.words.where}: tokenizer: missing: {self.models[which]}"
        if any(each.count_rounds()[1] for each in (model, donor)):
            raise PlanError(f"{where}: rows are made of those that are stored; write the stage first, and merge that")
        if method.takes_targets and not len(shared):
            raise PlanError(
                f"{where}: has no token in common with {self.models[part.donor]}, so {options.method} has nothing to "
                "go by; mean, subword or john_hewitt need none"
            )
        vocabulary = self._find_vocabulary(which)
        changes = make_changes(
            new=part.numbers.tolist(),
            targets=other[part.numbers].tolist(),
            shared=list(zip(other[shared].tolist(), own[shared].tolist(), strict=True)),
            tokens=sorted({*vocabulary.ids.values()}),
            spellings=self._spell(part, vocabulary, where),
        )
        asked = Manner(
            options.method,
            f"{self.tensor}, {which}",
            min(options.k, max(1, len(shared))),
            options.metric,
            options.weights,
            options.subword,
            may_be_tied(self.tensor, self.words.family),
            seed=self.words.seed,
        )
        looked = method.takes_targets or method.sums == "pairs"
        return transplant(expression, Matrices(model, donor if looked else None, changes), asked)

    def _find_vocabulary(self, which: int) -> Vocabulary:
        known, source = self.words.vocabularies, self.words.joined.source
        return known.get(self.models[which], known[source])

    def _spell(self, part: MissingPart, vocabulary: Vocabulary, where: str) -> list[list[int]]:
        if self.options.method != "subword":
            return [[] for _ in part.numbers]
        names = {number: token for token, number in self.words.joined.ids.items()}
        tokens = [names[number] for number in part.numbers.tolist()]
        return spell_tokens(tokens, self._find_vocabulary(part.donor), vocabulary, where=where)


def start_making(
    words: JoinedWords, given: Missing, tensor: str, models: list[str], holders: Holders, found: Mapping[str, Offer]
) -> MissingRows:
    """Return how rows of a tensor are made; `PlanError` where they cannot be as the recipe asks."""
    return MissingRows(words, tensor, models, holders, found, _read_options(given, words.where))


def _read_options(given: Missing, where: str) -> TransplantOptions:
    where = f"{where}: tokenizer: missing"
    asked = {key: value for key, value in given.model_dump().items() if value is not None}
    options = parse_options(asked, where=where)
    if options.method == "mp_rope":
        raise PlanError(f"{where}: method is 'mp_rope', which knows pairs of models alone; omp is like it")
    return options
