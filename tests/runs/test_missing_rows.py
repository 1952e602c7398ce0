"""Tokens that a model of a merge lacks get rows made of its own: each against its formula; refusals; cuts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import read_tensors, write_llama
from oracles import transplants as oracles
from runs.merging import hash_output
from tokenizers import Tokenizer
from trained import SENTENCES, train, write_tokenizer_files

from mergemill.cli.main import execute
from mergemill.engine import errors, make_plan, run, verify
from mergemill.engine.plan.values import Plan

NAMES = ("model.embed_tokens.weight", "lm_head.weight")
K = 5
ORDER = ("base", "second", "third")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of different words; the second has rows beyond its tokens."""
    folder, texts, found = tmp_path_factory.mktemp("missing"), [*SENTENCES.values()], {}
    parts = (("base", texts[:2], 320), ("second", texts[2:4] + texts[:1], 330), ("third", texts[4:6], 310))
    for seed, (name, part, size) in enumerate(parts):
        tokenizer = train("bytes", part, size)
        rows = tokenizer.get_vocab_size() + 7 * (name == "second")
        write_llama(folder / name, seed=seed, layers=1, hidden=48, vocab=rows, dtype="float32")
        write_tokenizer_files(folder / name, tokenizer)
        found[name] = folder / name
    return found


def plan_union(models: Mapping[str, Path], missing: dict[str, Any], **more: Any) -> Plan:
    named = [{"model": str(models[name]), "parameters": {"weight": 1.0}} for name in ORDER]
    tokenizer = {"source": "union", "missing": missing}
    recipe = {"merge_method": "linear", "base_model": str(models["base"]), "models": named, "tokenizer": tokenizer}
    return make_plan(recipe, **more)


def make_row(method: str, y: Any, x: Any, w: Any, tokens: Any) -> Any:
    if method == "omp":
        return oracles.omp(y, x, w, K)
    if method == "mean":
        return tokens.mean(0)
    return oracles.interpolation(y, x, w, K, "cosine", "barycentric")


@pytest.mark.parametrize("method", ["omp", "common_interpolation", "mean"])
def test_each_model_has_the_rows_that_its_own_embedding_implies(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    missing: dict[str, Any] = {"method": method, "k": K}
    if method == "common_interpolation":
        missing |= {"metric": "cosine", "weights": "barycentric"}
    plan = plan_union(models, missing)
    run(plan, tmp_path / "out")
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    known = {name: Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for name, path in models.items()}
    for tensor in NAMES:
        stored = {name: read_tensors(path)[tensor].double().numpy() for name, path in models.items()}
        merged = read_tensors(tmp_path / "out")[tensor].double().numpy()
        for token, number in list(ids.items())[::7]:
            rows = []
            for name in ORDER:
                if token in known[name]:
                    rows.append(stored[name][known[name][token]])
                    continue
                donor = next(each for each in ORDER if token in known[each])
                both = sorted(known[donor].keys() & known[name].keys(), key=lambda each: known[donor][each])
                x = stored[donor][[known[donor][each] for each in both]]
                w = stored[name][[known[name][each] for each in both]]
                own = stored[name][sorted(known[name].values())]
                rows.append(make_row(method, stored[donor][known[donor][token]], x, w, own))
            np.testing.assert_allclose(merged[number], np.mean(rows, 0), rtol=0, atol=2e-5 * np.abs(merged).max())
    assert plan.tokens is not None
    assert {each.approximated for each in plan.tokens.rows} == {method}


def test_parts_and_workers_do_not_show_and_a_replay_finds_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    missing = {"method": "omp", "k": K}
    run(plan_union(models, missing), tmp_path / "one")
    run(plan_union(models, missing, shard_size="60KB"), tmp_path / "cut", workers=0, threads=2)
    verify(tmp_path / "one", replay=9)
    one, cut = (read_tensors(tmp_path / each) for each in ("one", "cut"))
    assert all(np.array_equal(one[name], cut[name]) for name in one)
    assert hash_output(tmp_path / "one") != hash_output(tmp_path / "cut")


def test_the_plan_says_how_rows_are_made(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(plan_union(models, {"method": "omp"}).origin.text)
    assert execute(["plan", str(recipe), "--tokens"]) == 0
    assert ": by omp, after " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"method": "opm"}, "tokenizer: missing: method is 'opm'; did you mean 'omp'"),
        ({"method": "mp_rope"}, "tokenizer: missing: method is 'mp_rope', which knows pairs of models alone"),
        ({"metric": "cosin"}, "tokenizer: missing: metric is 'cosin'; did you mean 'cosine'"),
        ({"k": 0}, "'k' must be from 1"),
        ({"methd": "omp"}, "unknown key 'methd'; did you mean 'method'"),
    ],
)
def test_what_cannot_be_made_is_refused_before(models: dict[str, Path], missing: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.InputError) as found:
        plan_union(models, missing)
    assert said in str(found.value)
