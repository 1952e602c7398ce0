"""Models judged layer by layer against transformers' own pass over the model that is written."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from evaluation.families import FAMILIES, TEXT, read_log_probs, tokenize, write_family

from mergemill.engine import evaluate, make_plan, merge
from mergemill.engine.errors import InputError, PlanError
from mergemill.engine.evaluation.evaluating import TextSource, evaluate_plans
from mergemill.engine.evaluation.scoring import start_running
from mergemill.engine.evaluation.sums import sum_rows, sum_windows
from mergemill.engine.evaluation.texts import make_windows, read_examples

WINDOW = 32


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each family, two of llama, and the text. Not to be changed."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_family(folder / family, family)
    write_family(folder / "other", "llama", seed=1)
    (folder / "text.txt").write_text(TEXT)
    return folder


def judge_by_transformers(folder: Path) -> tuple[float, float, int]:
    """Return loss, entropy and count of the windows of `TEXT`, as the spec says them, straight from the formulas."""
    ids, begin = tokenize(folder)
    rows = [begin + ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW) if len(ids) - start > 1]
    first = max(1, len(begin))
    nll = entropy = count = 0.0
    for row, log_probs in zip(rows, read_log_probs(folder, rows), strict=True):
        for place in range(first, len(row)):
            nll -= float(log_probs[place - 1, row[place]])
            entropy -= float((log_probs[place - 1].exp() * log_probs[place - 1]).sum())
            count += 1
    return nll / count, entropy / count, int(count)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_layer_by_layer_is_transformers_model(families: Path, family: str) -> None:
    found = evaluate(str(families / family), TextSource(text=str(families / "text.txt"), window=WINDOW))
    nll, entropy, count = judge_by_transformers(families / family)
    assert found.nll == pytest.approx(nll, abs=1e-5)
    assert found.entropy == pytest.approx(entropy, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert (found.tokens, found.bytes) == (count, len(TEXT.encode()))
    assert found.bits_per_byte == pytest.approx(nll * count / math.log(2) / len(TEXT.encode()), abs=1e-4)


RECIPE = """\
merge_method: ties
base_model: {0}/llama
models:
  - {{model: {0}/other, parameters: {{weight: {1}, density: 0.6}}}}
  - {{model: {0}/llama, parameters: {{weight: 0.2, density: 0.5}}}}
parameters: {{normalize: false}}
dtype: bfloat16
"""


def test_a_recipe_is_judged_as_what_it_would_write_and_nothing_is_written(families: Path, tmp_path: Path) -> None:
    source = TextSource(text=str(families / "text.txt"), window=WINDOW, stride=20)
    recipe = RECIPE.format(families, 0.7)
    found = evaluate(recipe, source)
    merge(recipe, tmp_path / "out")
    written = evaluate(str(tmp_path / "out"), source)
    whole = evaluate(recipe, source, whole=True)
    assert written.losses == pytest.approx(found.losses, abs=1e-6)
    assert whole.losses == pytest.approx(found.losses, abs=1e-5)
    assert found.nll == pytest.approx(whole.nll, abs=1e-6)
    assert found.stderr is not None


def test_a_generation_reads_each_layer_once(families: Path) -> None:
    """All that the others need is there already, and what is found is the same."""
    source = TextSource(text=str(families / "text.txt"), window=WINDOW)
    plans = [make_plan(RECIPE.format(families, weight)) for weight in (0.1, 0.5, 0.9)]
    together = evaluate_plans(plans, source)
    alone = [evaluate_plans([plan], source)[0] for plan in plans]
    for one, other in zip(together, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-6)
    assert len({round(each.nll, 9) for each in together}) == 3
    assert [each.bytes_read for each in together[1:]] == [0, 0]
    assert together[0].bytes_read == alone[0].bytes_read
    weights = sum((families / name / "model.safetensors").stat().st_size for name in ("llama", "other"))
    assert together[0].bytes_read < weights


def test_little_memory_takes_texts_in_turns_and_less_is_refused_with_the_number(families: Path) -> None:
    """The scores are the same to the last bit, since the same texts go through a layer together."""
    source = TextSource(text=str(families / "text.txt"), window=WINDOW, stride=10)
    whole = evaluate(str(families / "qwen2"), source)
    with pytest.raises(PlanError, match="is too little: a layer of this model and a text take") as caught:
        evaluate(str(families / "qwen2"), source, memory="1MiB")
    need = int(str(caught.value).partition(" take ")[2].split()[0])
    turns = evaluate(str(families / "qwen2"), source, memory=need + 60_000)
    assert turns.losses == whole.losses
    assert turns.bytes_read > whole.bytes_read


def test_a_generation_of_eight_reads_what_one_merge_reads(families: Path, tmp_path: Path) -> None:
    """Of a tied model the embedding too, which is wanted twice."""
    write_family(tmp_path / "other", "qwen2", seed=1)
    recipe = RECIPE.replace("{0}/llama", "{0}/qwen2").replace("{0}/other", str(tmp_path / "other"))
    plans = [make_plan(recipe.format(families, place / 8)) for place in range(8)]
    found = evaluate_plans(plans, TextSource(text=str(families / "text.txt"), window=WINDOW))
    merged = merge(plans[0].origin.text, tmp_path / "out", workers=0)
    assert len({each.nll for each in found}) == 8
    assert sum(each.bytes_read for each in found) == merged.read_bytes


def test_examples_count_alike_whatever_their_length(families: Path, tmp_path: Path) -> None:
    lines = [("The harbour", " wakes before the town."), ("Boats", " go out one by one, and the gulls follow.")]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"input": given, "output": output}) for given, output in lines))
    found = evaluate(str(families / "llama"), TextSource(examples=str(path)))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(families / "llama")
    befores = [tokenizer(given)["input_ids"] for given, _ in lines]
    rows = [
        [*before, *tokenizer(output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for before, (_, output) in zip(befores, lines, strict=True)
    ]
    means = []
    for row, before, log_probs in zip(rows, befores, read_log_probs(families / "llama", rows), strict=True):
        wanted = range(len(before), len(row))
        means.append(-sum(float(log_probs[place - 1, row[place]]) for place in wanted) / len(wanted))
    assert found.losses == pytest.approx(means, abs=1e-5)
    assert found.nll == pytest.approx(sum(means) / 2, abs=1e-5)


class Letters:
    """A tokenizer of one id a letter, with BOS where `begin`."""

    is_fast, bos_token_id = True, 1

    def __init__(self, *, begin: bool) -> None:
        self.begin = [1] if begin else []

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: object) -> dict[str, object]:
        ids = [ord(letter) for letter in text]
        offsets = [(place, place + 1) for place in range(len(text))]
        return {"input_ids": [*(self.begin if add_special_tokens else []), *ids], "offset_mapping": offsets}


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(4, 4), (5, 2), (8, 3), (40, 40), (4, 1)])
def test_windows_score_each_id_once_that_has_one_before_it(begin: bool, window: int, stride: int) -> None:
    text = "".join(chr(97 + place) for place in range(23))
    tokens = make_windows(Letters(begin=begin), text, window=window, stride=stride, windows=None)
    seen = tokens.ids[tokens.scored].tolist()
    assert len(seen) == len(set(seen))
    lacking = set(map(ord, text)) - set(seen)
    firsts = {ord(text[start]) for start in range(0, 23, stride)} if stride == window and not begin else {ord("a")}
    assert lacking <= (firsts if not begin else set()) | {ord(text[-1])}
    assert not tokens.scored[:, 0].any()
    assert tokens.text_bytes == 23


def test_some_windows_count_the_bytes_of_their_own_text() -> None:
    text = "abcdefghijklmnopqrstuvwxyzüüüüüü"
    tokens = make_windows(Letters(begin=False), text, window=4, stride=4, windows=2)
    assert tokens.ids.tolist() == [[ord(x) for x in text[:4]], [ord(x) for x in text[16:20]]]
    assert tokens.text_bytes == 8


@pytest.mark.parametrize(("text", "window"), [("a", 4), ("", 4), ("abcdef", 1)])
def test_a_text_of_no_two_tokens_is_refused(text: str, window: int) -> None:
    with pytest.raises(InputError):
        make_windows(Letters(begin=False), text, window=window, stride=window, windows=None)


@pytest.mark.parametrize("line", ["", "[1]", '{"input": "a"}', '{"input": 1, "output": "b"}', "{"])
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "few.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"few\.jsonl(:2: is no example|: holds no example)"):
        read_examples(tmp_path / "few.jsonl")


@pytest.mark.parametrize("cuts", [[7], [1, 2, 4], [3, 4], [1] * 7])
def test_blocks_of_a_head_add_up_to_the_whole(cuts: Sequence[int]) -> None:
    draw = random.Random(1)
    logits = torch.tensor([[[draw.gauss(0, 20) for _ in range(7)] for _ in range(5)] for _ in range(3)])
    labels = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    running, first = start_running((3, 5)), 0
    for size in cuts:
        running.add(slice(None), logits[..., first : first + size], labels, first)
        first += size
    loss, entropy = running.finish()
    log_probs = logits.double().log_softmax(-1)
    torch.testing.assert_close(loss, -log_probs.gather(-1, labels[..., None])[..., 0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-4, rtol=1e-5)


def test_the_standard_error_is_that_of_a_ratio_over_windows() -> None:
    tokens = make_windows(Letters(begin=False), "abcdefghijkl", window=4, stride=4, windows=None)
    loss = torch.tensor([[1.0, 2.0, 3.0, 9.0], [1.0, 1.0, 1.0, 9.0], [4.0, 2.0, 0.0, 9.0]], dtype=torch.float64)
    found = sum_windows(tokens, sum_rows(tokens, loss, loss))
    loss = loss[:, :-1]  # after the last nothing comes
    means = loss.mean(1)
    assert found.stderr is not None
    assert found.stderr / found.perplexity == pytest.approx(float(means.std() / math.sqrt(3)))
