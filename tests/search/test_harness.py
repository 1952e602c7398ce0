"""The objective lm_eval: what is made of its numbers, what is refused, and the package itself on a task of our own."""

import json
import math
from pathlib import Path

import pytest
from evaluation.families import write_family
from search.toys import make_search

from mergemill.engine.errors import InputError, PlanError
from mergemill.engine.recipe.harness import HarnessObjective
from mergemill.engine.search import harness
from mergemill.engine.search.command import CommandFailed
from mergemill.engine.search.harness import run_lm_eval
from mergemill.engine.search.searches import run_search

TASKS = [{"task": "one", "weight": 2.0}, {"task": "two", "metric": "f1,none"}]


def judge(monkeypatch: pytest.MonkeyPatch, found: object) -> harness.Result:
    """Return what is made of what lm_eval prints."""
    printed = b"some words\n" + (found if isinstance(found, bytes) else json.dumps(found).encode()) + b"\n"
    monkeypatch.setattr(harness, "run_words", lambda *given: printed)
    return run_lm_eval(HarnessObjective.model_validate({"tasks": TASKS}), "model", 1.0)


def test_a_score_is_the_weighted_sum_and_its_error_that_of_independent_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = {"acc,none": 0.5, "acc_stderr,none": 0.03}, {"f1,none": 0.25, "f1_stderr,none": 0.08}
    score, error, parts = judge(monkeypatch, {"one": one, "two": two})
    assert (score, parts) == (1.25, (0.5, 0.25))
    assert error == pytest.approx(math.hypot(0.06, 0.08))
    assert judge(monkeypatch, {"one": one, "two": {"f1,none": 0.25, "f1_stderr,none": "N/A"}})[1] is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"one": {"acc,none": 1.0}, "two": {"acc,none": 1.0}}, "two has no number 'f1,none'; it has acc,none"),
        ({"two": {"f1,none": 1.0}}, "one has no number 'acc,none'; it has none"),
        ({"one": {"acc,none": math.nan}, "two": {"f1,none": 1.0}}, "one has no number 'acc,none'"),
        (b"Segmentation", "printed no result"),
    ],
)
def test_what_gives_no_number_has_failed(monkeypatch: pytest.MonkeyPatch, found: object, words: str) -> None:
    with pytest.raises(CommandFailed, match=words):
        judge(monkeypatch, found)


def test_public_benchmarks_are_searched_on_only_where_it_is_said(here: Path, tmp_path: Path) -> None:
    search = make_search("", strategy={"name": "grid", "steps": 2})
    search["objective"] = {"lm_eval": {"tasks": [{"task": "mmlu_law"}, {"task": "mine"}]}}
    with pytest.raises(PlanError, match=r"mmlu_law: a test set of a public benchmark.*--on-benchmarks"):
        run_search(search, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_without_the_package_the_extra_is_named(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = make_search("", strategy={"name": "grid", "steps": 2})
    search["objective"] = {"lm_eval": {"tasks": [{"task": "mine"}]}}
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install mergemill\[lm-eval\]"):
        run_search(search, tmp_path / "s")


TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{0}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" wakes", " one by one"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_lm_eval_itself_judges_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of two samples; of one model the number is found by transformers too."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install mergemill[lm-eval]")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions = [("The harbour", 0), ("the boats go out", 1), ("the town", 0), ("the boats", 0), ("out", 1)]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("\n".join(json.dumps({"question": text, "label": label}) for text, label in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.format(samples))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for seed, name in enumerate(("a", "b")):
        write_family(tmp_path / name, "llama", seed=seed)
    weights = [{"model": str(tmp_path / name), "parameters": {"weight": f"${{{name}}}"}} for name in ("a", "b")]
    search = {
        "recipe": {"merge_method": "linear", "models": weights},
        "variables": {"a": {"choices": [1.0]}, "b": {"choices": [0.0]}},
        "objective": {"lm_eval": {"tasks": [{"task": "mine"}], "include_path": str(tmp_path / "tasks")}},
        "strategy": {"name": "grid"},
    }
    (trial,) = run_search(search, tmp_path / "s").trials

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()

    def find_loss(text: str, more: str) -> float:
        ids, start = tokenizer(text + more, return_tensors="pt")["input_ids"], len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        return -float(logits[start - 1 : -1].gather(1, ids[0, start:, None]).sum())

    right = [min((0, 1), key=lambda i, q=q: find_loss(q, (" wakes", " one by one")[i])) == y for q, y in questions]
    assert trial.score == pytest.approx(sum(right) / len(right))
    assert trial.stderr is not None
    assert not list((tmp_path / "s" / "candidates").iterdir())
