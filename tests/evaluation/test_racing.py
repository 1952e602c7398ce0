"""Races: who is left behind, what is said of its rest, and that the others' scores are those without a race."""

from collections.abc import Sequence

import pytest
import torch

from mergemill.engine.errors import InputError
from mergemill.engine.evaluation.racing import find_behind, race
from mergemill.engine.evaluation.sums import RowSums
from mergemill.engine.evaluation.texts import ScoredTokens


def make_tokens(windows: int, length: int = 6) -> ScoredTokens:
    """Return windows whose ids are their numbers; of the last, half is scored."""
    scored = torch.ones((windows, length), dtype=torch.bool)
    scored[:, 0] = False
    scored[-1, length // 2 :] = False
    return ScoredTokens(torch.arange(windows)[:, None].expand(windows, length), scored, 100)


def run(losses: Sequence[torch.Tensor], tokens: ScoredTokens) -> tuple[list[torch.Tensor], list[bool], list[int]]:
    """Return the losses after a race, who was left behind, and how many windows each model was judged on."""
    judged = [0] * len(losses)

    def judge(places: Sequence[int], some: ScoredTokens) -> list[RowSums]:
        for place in places:
            judged[place] += len(some.ids)
        return [RowSums(losses[place][some.ids[:, 0]], -losses[place][some.ids[:, 0]]) for place in places]

    found = race(tokens, len(losses), judge)
    return [each.loss for each, _ in found], [raced for _, raced in found], judged


def test_who_is_behind_is_judged_on_half_and_the_others_as_without_a_race() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = make_tokens(12)
    counts = tokens.scored.sum(1)
    best = counts * (3 + torch.rand(12, generator=draw, dtype=torch.float64))
    noise = counts * 0.2 * torch.randn(12, generator=draw, dtype=torch.float64)
    losses = [best + 0.5 * counts + noise / 10, best, best + noise]
    found, raced, judged = run(losses, tokens)
    assert (raced, judged) == ([True, False, False], [6, 12, 12])
    for place in (1, 2):
        assert torch.equal(found[place], losses[place])
    assert torch.equal(found[0][0::2], losses[0][0::2])
    assert float(found[0].sum()) == pytest.approx(float(losses[0].sum()), rel=0.02)
    assert float(found[0].sum()) > float(best.sum())


def test_the_gap_is_two_paired_standard_errors_of_a_token() -> None:
    tokens = make_tokens(4, 3)
    counts, zero = tokens.scored.sum(1), torch.zeros(4, dtype=torch.float64)
    gaps = counts * torch.tensor([0.1, 0.2, 0.3, 0.2], dtype=torch.float64)
    best, behind = find_behind(tokens, [gaps, zero, zero])
    assert (best, behind[1:]) == (1, [None, None])
    assert behind[0] == pytest.approx(float(gaps.sum() / counts.sum()))
    wide = counts * torch.tensor([1.0, -0.9, 0.2, 0.0], dtype=torch.float64)
    assert find_behind(tokens, [zero, wide])[1] == [None, None]


def test_a_text_of_few_windows_is_no_race() -> None:
    with pytest.raises(InputError, match="has 7 windows, and a race needs 8"):
        run([torch.zeros(7)], make_tokens(7))
