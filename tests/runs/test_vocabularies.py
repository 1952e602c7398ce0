"""Merges of models with different vocabularies: every row against the rule, written plainly; files, ids, loaders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import read_tensors, write_llama
from runs.merging import SMALL_PART, parts_of
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from trained import SENTENCES, make_corpus, train, write_tokenizer_files

from mergemill.cli.main import execute
from mergemill.engine import errors, make_plan, run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.graph import make_tasks

CHATML = ("<|im_start|>", "<|im_end|>")
NAMES = ("model.embed_tokens.weight", "lm_head.weight")
HIDDEN = 64


def write_model(
    folder: Path, tokenizer: Tokenizer, *, seed: int, rows: int, hidden: int = HIDDEN, **config: Any
) -> Path:
    write_llama(folder, seed=seed, layers=1, hidden=hidden, vocab=rows, dtype="float32")
    write_tokenizer_files(folder, tokenizer)
    for name, changes in (("config.json", config), ("generation_config.json", config)):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | changes, indent=2))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with padding rows, a fine-tune of it with ChatML, one that knows other words, and one of other ids."""
    folder = tmp_path_factory.mktemp("vocabularies")
    texts = [*SENTENCES.values()]
    base = train("bytes", texts, 400)
    tuned = Tokenizer.from_str(base.to_str())
    tuned.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in CHATML])
    other = train("bytes", [text[::-1] for text in texts] + texts[2:4], 420)
    other.add_special_tokens([AddedToken(CHATML[1], special=True, normalized=False)])
    return {
        "base": write_model(folder / "base", base, seed=1, rows=416),
        "tuned": write_model(folder / "tuned", tuned, seed=2, rows=402, eos_token_id=401),
        "other": write_model(folder / "other", other, seed=3, rows=421, eos_token_id=2),
    }


def plan_merge(found: Mapping[str, Path], /, *, method: str = "linear", **more: Any) -> Plan:
    text = json.dumps({"merge_method": method, **more})
    for name, path in found.items():
        text = text.replace(f'"@{name}"', json.dumps(str(path)))
    return make_plan(text)


def list_models(*names: str) -> list[dict[str, Any]]:
    return [{"model": f"@{name}", "parameters": {"weight": 1.0}} for name in names]


def read_ids(folder: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True))


def average_rows(
    models: Mapping[str, Path],
    tensor: str,
    ids: Mapping[str, int],
    rows: int,
    *,
    base: str | None,
    source: str,
    fixed: Mapping[str, tuple[np.ndarray[Any, Any], bool]] | None = None,
    padded: bool = False,
) -> np.ndarray[Any, Any]:
    """The rules, token by token, and the mean of the inputs."""
    stored = {name: read_tensors(path)[tensor].double().numpy() for name, path in models.items()}
    known = {name: read_ids(path) for name, path in models.items()}
    texts = {number: text for text, number in ids.items()}
    made = {name: np.zeros((rows, HIDDEN)) for name in models}
    for number in range(rows):
        text = texts.get(number)
        for name, matrix in made.items():
            has = [each for each in models if text in known[each] and known[each][text] < len(stored[each])]
            if text is None:
                if not padded and number < len(stored[source]):
                    matrix[number] = stored[source][number]
            elif fixed and text in fixed and (fixed[text][1] or name not in has):
                matrix[number] = fixed[text][0]
            elif name in has:
                matrix[number] = stored[name][known[name][text]]
            elif len(has) == 1 or base in has:
                donor = has[0] if len(has) == 1 else str(base)
                matrix[number] = stored[donor][known[donor][text]]
            elif has:
                matrix[number] = np.mean([stored[each][known[each][text]] for each in has], 0)
    if padded:
        for matrix in made.values():
            tokens = sorted(texts)
            matrix[[n for n in range(rows) if n not in texts]] = matrix[tokens].mean(0)
    return np.mean([*made.values()], 0)


def check_rows(out: Path, models: Mapping[str, Path], rows: int, **how: Any) -> dict[str, int]:
    ids = read_ids(out)
    merged = read_tensors(out)
    for name in NAMES:
        assert merged[name].shape == (rows, HIDDEN)
        wanted = average_rows(models, name, ids, rows, **how)
        torch.testing.assert_close(merged[name].double(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-7)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    return ids


def test_a_union_has_the_rows_and_ids_of_the_rule_and_loads(models: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_merge(models, models=list_models(*models), base_model="@base", tokenizer_source="union")
    run(plan, tmp_path / "out")
    own, other = read_ids(models["base"]), read_ids(models["other"])
    foreign = sorted(other.keys() - own.keys() - {*CHATML}, key=lambda each: other[each])
    order = [*foreign, *CHATML]
    ids = check_rows(tmp_path / "out", models, max(416, 400 + len(order)), base="base", source="base")
    assert ids == own | {token: 400 + i for i, token in enumerate(order)}
    assert plan.tokens is not None
    assert plan.tokens.added == tuple((token, ids[token]) for token in order)
    means = [each for each in plan.tokens.rows if len(each.rows) > 1]
    assert {each.token for each in means} == {CHATML[1]}
    assert {each.lacking for each in means} == {(str(models["base"]),)}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(models["base"])
    for line in make_corpus():
        assert loaded(line)["input_ids"] == plain(line)["input_ids"]
    assert loaded(f"x{CHATML[1]}")["input_ids"][-1] == ids[CHATML[1]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == max(416, 400 + len(order))


def test_padding_is_the_mean_of_an_inputs_rows_where_a_multiple_is_asked_for(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = {"source": "base", "pad_to_multiple_of": 64}
    run(plan_merge(models, models=list_models(*models), tokenizer=tokenizer), tmp_path / "out")
    check_rows(tmp_path / "out", models, 448, base=None, source="base", padded=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models["base"] / name).read_bytes()
    trimmed = {"source": "base", "pad_to_multiple_of": 1}
    run(plan_merge(models, models=list_models(*models), tokenizer=trimmed), tmp_path / "trimmed")
    check_rows(tmp_path / "trimmed", models, 400, base=None, source="base", padded=True)


def test_tokens_get_the_rows_that_a_recipe_gives_them(models: dict[str, Path], tmp_path: Path) -> None:
    """Every kind of source; a new key appended to the base's vocabulary into its padding; forced and not."""
    word = "harbour"
    tokens = {
        CHATML[1]: {"source": "@other"},
        CHATML[0]: {"source": {"kind": "model_token", "model": "@tuned", "token": CHATML[0]}},
        "<|zero|>": {"source": {"kind": "zero"}},
        "<|byid|>": {"source": {"kind": "model_token", "model": "@base", "token_id": 410}},
        "<s>": {"source": "@tuned", "force": True},
        word: {},
    }
    plan = plan_merge(models, models=list_models(*models), tokenizer={"source": "base", "tokens": tokens})
    assert sum("no model has a row for 'harbour'" in each for each in plan.warnings) == 1
    run(plan, tmp_path / "out")
    out = tmp_path / "out"
    ids = read_ids(out)
    assert [ids[each] for each in (CHATML[1], CHATML[0], "<|zero|>", "<|byid|>", word)] == [400, 401, 402, 403, 404]
    for name in NAMES:
        stored = {model: read_tensors(path)[name].double().numpy() for model, path in models.items()}
        known = {model: read_ids(path) for model, path in models.items()}
        fixed = {
            CHATML[1]: (stored["other"][known["other"][CHATML[1]]], False),
            CHATML[0]: (stored["tuned"][known["tuned"][CHATML[0]]], False),
            "<|zero|>": (np.zeros(HIDDEN), False),
            "<|byid|>": (stored["base"][410], False),
            "<s>": (stored["tuned"][known["tuned"]["<s>"]], True),
        }
        wanted = average_rows(models, name, ids, 416, base=None, source="base", fixed=fixed)
        torch.testing.assert_close(read_tensors(out)[name].double(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-7)
    made = Tokenizer.from_file(str(out / "tokenizer.json"))
    added = {each.content: each for each in made.get_added_tokens_decoder().values()}
    assert (added["<|zero|>"].special, added[word].special) == (True, False)
    assert made.encode(f"x<|zero|>{CHATML[1]}", add_special_tokens=False).ids[-2:] == [402, 400]
    assert plan.tokens is not None
    assert {each.token for each in plan.tokens.rows if each.forced} == {"<s>"}


def test_the_vocabulary_of_another_model_brings_its_ids(models: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_merge(models, models=list_models("base", "tuned"), base_model="@base", tokenizer_source="@tuned")
    assert plan.donor == f"{models['base']}, the base model; tokenizer of {models['tuned']}"
    run(plan, tmp_path / "out")
    pair = {name: models[name] for name in ("base", "tuned")}
    check_rows(tmp_path / "out", pair, 402, base="base", source="tuned")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models["tuned"] / "tokenizer.json").read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 401


def test_the_plan_lists_tokens_and_where_their_rows_come_from(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"<s>": {"source": {"kind": "zero"}, "force": True}}
    recipe = {"merge_method": "linear", "models": list_models(*models), "tokenizer": {"tokens": tokens}}
    text = json.dumps(recipe)
    for name, path in models.items():
        text = text.replace(f'"@{name}"', json.dumps(str(path)))
    (tmp_path / "recipe.yml").write_text(text)
    assert execute(["plan", str(tmp_path / "recipe.yml"), "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("tokens: those of"))
    number = read_ids(models["tuned"])[CHATML[1]]
    assert f"{models['base']}, " in lines[start]
    assert any(line.startswith("  new") and repr(CHATML[0]) in line for line in lines[start:])
    assert any(
        f"{CHATML[1]!r} in lm_head.weight: the mean of {models['tuned']} row {number} and" in line
        and line.endswith(f"for {models['base']}, which lacks it")
        for line in lines[start:]
    )
    (forced,) = (line for line in lines[start:] if "forced" in line and "lm_head" in line)
    assert forced.endswith("'<s>' in lm_head.weight: zeros for all")
    assert execute(["plan", str(tmp_path / "recipe.yml"), "--tokens", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["tokens"]["source"] == str(models["base"])


def test_a_model_that_is_not_merged_may_bring_the_vocabulary(models: dict[str, Path], tmp_path: Path) -> None:
    """Its tokens that no input has come with its own rows."""
    plan = plan_merge(models, models=list_models("base"), tokenizer_source="@tuned")
    assert [source.model for source in plan.sources] == [str(models["base"]), str(models["tuned"])]
    run(plan, tmp_path / "out")
    merged, base, tuned = (read_tensors(each) for each in (tmp_path / "out", models["base"], models["tuned"]))
    for name in NAMES:
        assert torch.equal(merged[name], torch.cat([base[name][:400], tuned[name][400:]]))


WRONG = {
    "no token": ({"<|im_stop|>": {"source": "@tuned"}}, "has no token '<|im_stop|>' with a row; did you mean '<|im_st"),
    "no row": ({"x": {"source": {"kind": "model_token", "model": "@base", "token_id": 416}}}, "none for the id 416"),
    "no source": ({"x": {"force": True}}, "force needs a source"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_nobody_has_is_an_error_of_the_plan(models: dict[str, Path], name: str) -> None:
    tokens, words = WRONG[name]
    with pytest.raises(errors.PlanError, match="tokens") as caught:
        plan_merge(models, models=list_models(*models), tokenizer={"source": "base", "tokens": tokens})
    assert words in str(caught.value)


def test_a_vocabulary_of_sentencepiece_alone_is_refused_with_the_way(models: dict[str, Path], tmp_path: Path) -> None:
    write_llama(tmp_path / "opaque", seed=5, layers=1, vocab=416, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "opaque" / name).unlink()
    (tmp_path / "opaque" / "tekken.json").write_text("{}")
    found = models | {"opaque": tmp_path / "opaque"}
    with pytest.raises(errors.PlanError, match=r"is in tekken\.json alone.*save_pretrained"):
        plan_merge(found, models=list_models("base", "opaque"), tokenizer_source="union")
    (tmp_path / "opaque" / "tekken.json").unlink()
    plan = plan_merge(found, models=list_models("base", "opaque"), tokenizer_source="union")
    assert plan.tokens is not None  # none at all: it counts as the base's
    assert plan.tokens.added == ()


def test_half_a_surrogate_pair_is_refused_where_a_tokenizer_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    data = json.loads((models["base"] / "tokenizer.json").read_text())
    data["model"]["vocab"]["x\udc80"] = 410
    write_llama(tmp_path / "halved", seed=4, layers=1, vocab=416, dtype="float32")
    (tmp_path / "halved" / "tokenizer.json").write_text(json.dumps(data))
    found = models | {"halved": tmp_path / "halved"}
    with pytest.raises(errors.PlanError) as caught:
        plan_merge(found, models=list_models("base", "halved"), tokenizer_source="union")
    assert rf"token 'x\udc80' of {tmp_path / 'halved'} is half a surrogate pair, which no" in str(caught.value)
    assert plan_merge(found, models=list_models("base", "halved"), tokenizer_source="base").tokens is not None


def test_ids_that_differ_are_told_where_nobody_asks(models: dict[str, Path], tmp_path: Path) -> None:
    data = json.loads((models["base"] / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    permuted = write_model(tmp_path / "permuted", Tokenizer.from_str(json.dumps(data)), seed=4, rows=416)
    found = models | {"permuted": permuted}
    (told,) = (each for each in plan_merge(found, models=list_models("base", "permuted")).warnings if "ids are" in each)
    assert f"2 ids are other tokens in {permuted} than in {models['base']}" in told
    assert "tokenizer_source: union" in told
    joined = plan_merge(found, models=list_models("base", "permuted"), tokenizer_source="union")
    assert not [each for each in joined.warnings if "ids are" in each]
    run(joined, tmp_path / "out")
    pair = {name: found[name] for name in ("base", "permuted")}
    check_rows(tmp_path / "out", pair, 416, base=None, source="base")


def test_a_chat_template_is_written_in_both_places_and_its_end_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    more = {"models": list_models("base", "tuned"), "base_model": "@base", "tokenizer_source": "union"}
    plan = plan_merge(models, chat_template="chatml", **more)
    (told,) = (each for each in plan.warnings if "ends a turn" in each)
    assert "'<|im_end|>', whose id 401 is no eos of generation_config.json (2)" in told
    assert '"eos_token_id": [2, 401]' in told
    run(plan, tmp_path / "out")
    text = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == text
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = [{"role": "user", "content": "hello"}]
    asked = loaded.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(errors.PlanError, match="chat_template is no Jinja"):
        plan_merge(models, chat_template="{{ messages", **more)
    with pytest.raises(errors.RecipeError, match="did you mean 'chatml'"):
        plan_merge(models, chat_template="chatlm", **more)


def test_the_template_that_most_models_have_is_chosen(models: dict[str, Path], tmp_path: Path) -> None:
    found = dict(models)
    for name, template in (("one", "{{ 'x' }}"), ("two", "{{ 'y' }}"), ("three", " {{ 'y' }}\n")):
        folder = write_llama(tmp_path / name, seed=7, layers=1, vocab=300)
        (folder / "chat_template.jinja").write_text(template)
        found[name] = folder
    plan = plan_merge(found, models=list_models("one", "two", "three"), chat_template="auto")
    made = {file.name: file.data for file in plan.files}
    assert made["chat_template.jinja"] == b"{{ 'y' }}"
    assert plan.digest == plan_merge(found, models=list_models("one", "two", "three"), chat_template="auto").digest


RECIPES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"parameters": {"weight": 0.6}},
    "ties": {"parameters": {"weight": 0.6, "density": 0.5}},
    "dare_ties": {"parameters": {"weight": 0.6, "density": 0.5}},
    "della": {"parameters": {"weight": 0.6, "density": 0.5, "epsilon": 0.1}},
    "model_stock": {},
    "slerp": {"parameters": {"t": 0.4}},
}


@pytest.fixture(scope="module")
def turned(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two models with its vocabulary, and the first of them with all ids turned round, and its rows."""
    folder = tmp_path_factory.mktemp("turned")
    made = {}
    for seed, name in enumerate(("base", "plain", "third", "turned")):
        seed = 1 if name == "turned" else seed
        made[name] = write_llama(folder / name, seed=seed, layers=1, hidden=HIDDEN, vocab=402, dtype="float32")
        (made[name] / "tokenizer.json").write_bytes((models["tuned"] / "tokenizer.json").read_bytes())
    data = json.loads((made["turned"] / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"] | {each["content"]: each["id"] for each in data["added_tokens"]}
    data["model"]["vocab"] = {token: 401 - number for token, number in vocab.items()}
    data["added_tokens"] = [each | {"id": 401 - each["id"]} for each in data["added_tokens"]]
    (made["turned"] / "tokenizer.json").write_text(json.dumps(data))
    tensors = read_tensors(made["turned"])
    moved = {name: tensors[name].flip(0).contiguous() for name in NAMES}
    save_file(tensors | moved, made["turned"] / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize("method", RECIPES)
def test_a_method_gives_for_turned_ids_what_it_gives_in_order(
    turned: dict[str, Path], tmp_path: Path, method: str
) -> None:
    found = []
    for name in ("plain", "turned"):
        entries = [{"model": f"@{each}"} for each in ((name,) if method == "slerp" else (name, "third"))]
        if method == "slerp":
            entries.insert(0, {"model": "@base"})
        recipe = {"models": entries, "base_model": "@base", "tokenizer_source": "base", **RECIPES[method]}
        run(plan_merge(turned, method=method, **recipe), tmp_path / name)
        found.append(read_tensors(tmp_path / name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_workers_and_cuts_do_not_show(models: dict[str, Path], tmp_path: Path) -> None:
    """Tensors of three blocks, with a padding mean that needs all of them, on threads and on two processes."""
    wide = {}
    for name, rows in (("base", 416), ("tuned", 402), ("other", 421)):
        tokenizer = Tokenizer.from_file(str(models[name] / "tokenizer.json"))
        wide[name] = write_model(tmp_path / name, tokenizer, seed=len(wide), rows=rows, hidden=512)
    recipe = {"models": list_models(*wide), "tokenizer": {"source": "union", "pad_to_multiple_of": 64}}
    run(plan_merge(wide, **recipe), tmp_path / "whole")
    with parts_of(SMALL_PART):
        cut = plan_merge(wide, **recipe)
    assert sum(not piece.whole for part in cut.parts for piece in part.pieces) > 4
    keys = {key for task in make_tasks(cut, cut.parts, [_nowhere] * len(cut.parts)) for key in task.dask}
    assert len({key for key in keys if key.startswith("constant-")}) == 3  # of three models, for embedding and head
    run(cut, tmp_path / "two", workers=2)
    whole, two = (read_tensors(tmp_path / name) for name in ("whole", "two"))
    assert all(torch.equal(whole[name], two[name]) for name in whole)


def test_a_stage_brings_the_vocabulary_that_it_makes(models: dict[str, Path], tmp_path: Path) -> None:
    """In one file, and one after the other: the same bytes, tensors and files."""
    first = {"merge_method": "linear", "models": list_models("base", "other"), "tokenizer_source": "union"}
    second = {"merge_method": "linear", "tokenizer": {"source": "@first", "pad_to_multiple_of": 32}}
    run(plan_merge(models, **first), tmp_path / "first")
    after = plan_merge({**models, "first": tmp_path / "first"}, models=list_models("tuned", "first"), **second)
    run(after, tmp_path / "after")
    documents = [{"name": "first", **first}, {"models": list_models("tuned", "first"), **second}]
    text = "---\n".join(json.dumps(each) + "\n" for each in documents).replace('"@first"', '"first"')
    for name, path in models.items():
        text = text.replace(f'"@{name}"', json.dumps(str(path)))
    run(make_plan(text), tmp_path / "together")
    one, other = (read_tensors(tmp_path / name) for name in ("after", "together"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_a_frankenmerge_has_rows_of_the_model_that_has_the_token(models: dict[str, Path], tmp_path: Path) -> None:
    """The embedding comes from the first slice's model, and a token of another's keeps that one's row."""
    slices = [{"sources": [{"model": f"@{name}", "layer_range": [0, 1]}]} for name in ("base", "tuned")]
    run(plan_merge(models, method="passthrough", slices=slices, tokenizer_source="union"), tmp_path / "out")
    ids, merged = read_ids(tmp_path / "out"), read_tensors(tmp_path / "out")
    assert ids == read_ids(models["tuned"])
    base, tuned = (read_tensors(models[name]) for name in ("base", "tuned"))
    embedding = torch.cat([base[NAMES[0]][:400], tuned[NAMES[0]][400:], base[NAMES[0]][402:]])
    assert torch.equal(merged[NAMES[0]], embedding)
    head = torch.cat([tuned[NAMES[1]], base[NAMES[1]][402:]])
    assert torch.equal(merged[NAMES[1]], head)


def test_an_adapter_and_a_quantised_model_are_renumbered_as_they_are(models: dict[str, Path], tmp_path: Path) -> None:
    """What is made of a model comes first, then its rows are put in order."""
    stored = read_tensors(models["other"])
    left, right = torch.randn(421, 4, generator=torch.Generator().manual_seed(1)), torch.ones(4, HIDDEN)
    (tmp_path / "adapter").mkdir()
    factors = {"base_model.model.lm_head.lora_A.weight": right, "base_model.model.lm_head.lora_B.weight": left}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    adapted = stored | {NAMES[1]: stored[NAMES[1]] + 2 * left @ right}
    scales = torch.linspace(0.5, 1.5, 4)[:, None]
    codes = torch.randn(421, HIDDEN, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    coded = adapted | {NAMES[0]: codes, f"{NAMES[0]}_scale_inv": scales}
    plain = adapted | {NAMES[0]: codes.float() * scales.repeat_interleave(128, 0)[:421]}
    found = dict(models)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name, tensors in (("coded", coded | {NAMES[1]: stored[NAMES[1]]}), ("plain", plain)):
        found[name] = write_model(
            tmp_path / name,
            Tokenizer.from_file(str(models["other"] / "tokenizer.json")),
            seed=3,
            rows=421,
            **({"quantization_config": quantization} if name == "coded" else {}),
        )
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    shared = {"tokenizer_source": "union", "base_model": "@base"}
    made = {}
    for name, ref in (("coded", f"{found['coded']}+{tmp_path / 'adapter'}"), ("plain", str(found["plain"]))):
        entries = [*list_models("base"), {"model": ref, "parameters": {"weight": 1.0}}]
        run(plan_merge(found, models=entries, **shared), tmp_path / f"out-{name}")
        made[name] = read_tensors(tmp_path / f"out-{name}")
    for name in NAMES:
        torch.testing.assert_close(made["coded"][name], made["plain"][name], rtol=1e-5, atol=1e-6)


def test_an_adapter_brings_the_tokenizer_that_it_was_trained_with(models: dict[str, Path], tmp_path: Path) -> None:
    """With it the embedding and the head that have rows for its tokens."""
    tuned = read_tensors(models["tuned"])
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.{name}": tuned[name] for name in NAMES}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    entries = [
        *list_models("base"),
        {"model": f"{models['base']}+{tmp_path / 'adapter'}", "parameters": {"weight": 1.0}},
    ]
    with pytest.raises(errors.CheckpointError, match=r"needs its tokenizer\.json beside it"):
        plan_merge(models, models=entries, base_model="@base", tokenizer_source="union")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((models["tuned"] / name).read_bytes())
    run(plan_merge(models, models=entries, base_model="@base", tokenizer_source="union"), tmp_path / "out")
    check_rows(tmp_path / "out", {name: models[name] for name in ("base", "tuned")}, 416, base="base", source="base")


def _nowhere() -> None: ...
