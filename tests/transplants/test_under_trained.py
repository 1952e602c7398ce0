"""Tokens that were hardly trained, in rows that were made so, and what a transplant makes of them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from models import read_tensors, write_llama
from runs.test_transplant import write_tokenizer
from safetensors.torch import save_file

from mergemill.engine import make_transplant_plan, run
from mergemill.engine.plan.transplant import list_transplanted
from mergemill.engine.transplants.under_trained import Floats, find_under_trained

ROWS, WIDTH = 400, 96
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def iter_slabs(matrix: Floats) -> Iterator[Floats]:
    yield from np.array_split(matrix, 7)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_are_short_or_like_unused_ones_are_found(tied: bool) -> None:
    stream = np.random.default_rng(3)
    embedding, head = stream.normal(size=(2, ROWS, WIDTH))
    towards = stream.normal(size=WIDTH)
    embedding[[5, 6, 390]] = towards + 0.01 * stream.normal(size=(3, WIDTH))
    head[[5, 6, 77]] = -towards + 0.01 * stream.normal(size=(3, WIDTH))
    embedding[[200, 201]] *= 1e-3
    found = find_under_trained(partial(iter_slabs, embedding), None if tied else partial(iter_slabs, head), [5, 6])
    wanted = {5, 6, 390} if tied else {5, 6, 390, 77, 200, 201}
    assert wanted <= set(found.tolist())
    short = np.argsort(np.linalg.norm(embedding, axis=1))[:4].tolist()  # 1 % of 400, of which two are as they were
    assert set(found.tolist()) == (wanted if tied else wanted | set(short))
    assert find_under_trained(partial(iter_slabs, embedding), None, []).tolist() == []


def test_a_transplant_makes_nothing_of_them(tmp_path: Path) -> None:
    """A token that is bad in one of the two is made, in both it is zeros; others are made of none of them."""
    words = [f"w{i}" for i in range(ROWS)]
    for name, seed in (("model", 1), ("donor", 2)):
        write_llama(tmp_path / name, seed=seed, layers=1, hidden=32, vocab=ROWS, dtype="float32")
        write_tokenizer(tmp_path / name, words[:-6] + [f"[unused{i}]" for i in range(3)] + words[-3:])
        stored = read_tensors(tmp_path / name)
        for number in (10, 11) if name == "model" else (11, 12):
            stored[EMBEDDING][number] *= 1e-4
        save_file(stored, tmp_path / name / "model.safetensors", {"format": "pt"})
    both = str(tmp_path / "model"), str(tmp_path / "donor")
    plain = [fate.kind for _, _, fate, _ in list_transplanted(*both, method="mean")]
    kinds = [fate.kind for _, _, fate, _ in list_transplanted(*both, method="mean", skip_under_trained=True)]
    assert set(plain) == {"same"}
    assert (kinds[10], kinds[11], kinds[12], kinds[ROWS - 6]) == ("approximated", "zero", "approximated", "zero")
    plan = make_transplant_plan(*both, method="omp", k=4, skip_under_trained=True)
    assert any("are under-trained or of no token; nothing is made of them" in each for each in plan.warnings)
    run(plan, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    assert not made[EMBEDDING][11].any()
    assert made[EMBEDDING][10].norm() > 0.1 * read_tensors(tmp_path / "donor")[EMBEDDING][10].norm()
