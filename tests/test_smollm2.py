"""A real model through the whole mill: SmolLM2-135M and two fine-tunes, merged by each method, then run."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama

from mergemill.engine import merge, verify
from mergemill.engine.recipe import parse_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the fixtures train, and count for the first test

# "base", "harbour" and "garden" stand for the folders.
TWO: dict[str, Any] = {"models": [{"model": "harbour"}, {"model": "garden"}]}
FROM_BASE = TWO | {"base_model": "base"}
RECIPES: Mapping[str, dict[str, Any]] = {
    "linear": TWO | {"parameters": {"weight": 0.5}},
    "slerp": TWO | {"base_model": "harbour", "parameters": {"t": [0.3, 0.7]}},
    "task_arithmetic": FROM_BASE | {"parameters": {"weight": 0.5}},
    "ties": FROM_BASE | {"parameters": {"weight": 1, "density": 0.5}},
    "dare_linear": FROM_BASE | {"parameters": {"weight": 0.5, "density": 0.6}},
    "dare_ties": FROM_BASE | {"parameters": {"weight": 0.5, "density": 0.6}},
    "passthrough": {
        "slices": [
            {"sources": [{"model": "harbour", "layer_range": [0, 15]}]},
            {"sources": [{"model": "garden", "layer_range": [15, 30]}]},
        ]
    },
}


@pytest.fixture(scope="module")
def folder(smollm2: Path, smollm2_variants: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the three models have the recipes' names."""
    folder = tmp_path_factory.mktemp("smollm2-merges")
    for name, model in zip(("base", "harbour", "garden"), (smollm2, *smollm2_variants), strict=True):
        (folder / name).symlink_to(model)
    return folder


@pytest.mark.parametrize("model", ["base", "harbour", "garden"])
def test_the_models_know_the_capital_of_france(model: str, folder: Path) -> None:
    from smollm2 import continue_text

    assert continue_text(folder / model).startswith(" Paris")


def test_the_fine_tunes_differ_from_their_base_and_from_each_other(folder: Path) -> None:
    base, harbour, garden = (read_tensors(folder / name) for name in ("base", "harbour", "garden"))
    for a, b in ((base, harbour), (base, garden), (harbour, garden)):
        assert sum(torch.equal(a[name], b[name]) for name in a) < len(a) / 10


@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_loads_and_still_knows_the_capital_of_france(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smollm2 import continue_text

    monkeypatch.chdir(folder)
    recipe = parse_recipe(json.dumps({"merge_method": method, **RECIPES[method]}))
    merge(recipe, tmp_path / "out", shard_size="100MB")
    verify(tmp_path / "out", replay=2)
    stored = read_tensors(tmp_path / "out")
    assert [name for name, tensor in stored.items() if not tensor.isfinite().all()] == []
    assert stored.keys() == read_tensors(folder / "base").keys()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert continue_text(tmp_path / "out").startswith(" Paris")


@pytest.fixture(scope="module")
def mixed(folder: Path) -> str:
    """A text of which each fine-tune has seen half."""
    from smollm2 import GARDEN, HARBOUR

    path = folder / "mixed.txt"
    path.write_text(f"{HARBOUR}\n\n{GARDEN}")
    return str(path)


def test_a_search_beats_the_average_and_both_parents(
    folder: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidate 0 is the average; what each text taught adds up better than it averages."""
    from mergemill.engine.search.searches import run_search

    monkeypatch.chdir(folder)
    weighted = [{"model": name, "parameters": {"weight": f"${{{name}}}"}} for name in ("harbour", "garden")]
    search = {
        "recipe": {"merge_method": "task_arithmetic", "base_model": "base", "models": weighted},
        "variables": {name: {"low": 0.0, "high": 1.5, "start": 0.5} for name in ("harbour", "garden")},
        "objective": {"perplexity": {"text": mixed, "window": 32, "windows": 2}},
        "strategy": {"name": "cma", "seed": 5, "population": 4},
        "budget": {"evaluations": 4},
    }
    found = run_search(search, tmp_path / "found")
    parents = json.loads((tmp_path / "found" / "parents.json").read_bytes())["parents"]
    average, best = found.trials[0].score, found.best
    assert best is not None
    assert best.score is not None
    assert average is not None
    assert len(parents) == 3
    assert best.score < 0.9 * min(average, *(parent["score"] for parent in parents))
    stored = sum(next((folder / name).glob("*.safetensors")).stat().st_size for name in ("base", "harbour", "garden"))
    assert stored > sum(trial.bytes_read for trial in found.trials) > 0.99 * stored  # of all three, less the headers


def test_a_soup_is_no_worse_than_its_best_model_and_a_cocktail_weighs_by_losses(
    folder: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergemill.engine.recipe.objectives import Objective
    from mergemill.engine.search.searches import run_cocktail, run_soup

    monkeypatch.chdir(folder)
    objective = Objective.model_validate({"perplexity": {"text": mixed, "window": 24, "windows": 2}})
    soup = run_soup({"merge_method": "linear", **TWO, "parameters": {"weight": 1}}, tmp_path / "soup", objective)
    alone = {trial.values["models"]: trial.score for trial in soup.found.trials}
    best = min(alone["harbour",] or 0, alone["garden",] or 0)
    assert soup.scores[0] == best
    assert (alone[soup.kept] or 0) <= best  # type: ignore[index]
    cocktail = run_cocktail(["harbour", "garden"], tmp_path / "cocktail", objective, temperature=0.1)
    losses = [math.log(alone[name,] or 0) for name in ("harbour", "garden")]
    assert cocktail.losses == pytest.approx(losses, abs=1e-6)
    shares = [math.exp(-loss / 0.1) for loss in losses]
    assert cocktail.weights == pytest.approx([share / sum(shares) for share in shares], rel=1e-4)


def test_a_union_encodes_as_smollm2_does(smollm2: Path, tmp_path: Path) -> None:
    """Its own tokenizer of 49,152 tokens joined with one that knows other words and a chat's markers."""
    from tokenizers import AddedToken, Tokenizer
    from trained import SENTENCES, make_corpus, train, write_tokenizer_files

    from mergemill.engine.checkpoint.checkpoint import open_checkpoint
    from mergemill.engine.tokens.joining import join_vocabularies
    from mergemill.engine.tokens.reading import read_vocabulary_of
    from mergemill.engine.tokens.writing import write_tokenizer

    other = train("bytes", [*SENTENCES.values()] * 2, 900)
    other.add_special_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    write_llama(tmp_path, seed=1, layers=1, vocab=other.get_vocab_size())
    write_tokenizer_files(tmp_path, other)
    found = {name: read_vocabulary_of(open_checkpoint(str(path))) for name, path in (("a", smollm2), ("b", tmp_path))}
    vocabularies = {name: each for name, each in found.items() if each is not None}
    joined = join_vocabularies(vocabularies, "a", union=True)
    made = Tokenizer.from_str(write_tokenizer(joined, vocabularies).decode())
    own = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert joined.regular
    assert joined.ids == made.get_vocab(with_added_tokens=True)
    for line in make_corpus():
        assert made.encode(line, add_special_tokens=False).ids == own.encode(line, add_special_tokens=False).ids
    assert made.encode("x<|turn|>", add_special_tokens=False).ids[-1] == joined.ids["<|turn|>"]
    assert made.decode(range(joined.size), skip_special_tokens=False)
