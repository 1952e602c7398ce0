"""The model card: front matter that the Hub reads, and a recipe that can be copied out of it."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mergemill.engine.checkpoint import (
    Card,
    Terms,
    common_license,
    hub_names,
    make_card,
    open_checkpoint,
    read_terms,
    warn_of_terms,
)
from mergemill.engine.checkpoint.card import name_card
from mergemill.engine.checkpoint.terms import common_lists, parse_front_matter

RECIPE = "merge_method: ties\nmodels:\n- model: org/a\n"
CARD = {
    "title": "my-merge",
    "method_title": "TIES",
    "method_source": 'Yadav et al., "TIES-Merging", arXiv:2306.01708.',
    "models": ["org/base", "./local", "org/tuned@main"],
    "recipe_text": RECIPE,
    "dtypes": ["BF16"],
    "tensor_count": 291,
    "parameter_count": 8030261248,
    "terms": {"org/base": Terms({"license": "apache-2.0"})},
    "library": "transformers",
}


def make(**changes: object) -> str:
    return make_card(Card(**(CARD | changes)))


def write_readme(folder: Path, text: str | None):
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    if text is not None:
        (folder / "README.md").write_text(text)
    return open_checkpoint(str(folder))


def test_front_matter_is_what_the_hub_reads():
    assert yaml.safe_load(make().split("---\n")[1]) == {
        "base_model": ["org/base", "org/tuned"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergemill"],
        "license": "apache-2.0",
    }


def test_without_hub_models_or_licence_the_keys_are_absent():
    front = yaml.safe_load(make(models=["/a", "s3://b/c"], terms={}).split("---\n")[1])
    assert list(front) == ["base_model_relation", "library_name", "tags"]


def test_body_names_method_models_numbers_and_recipe():
    body = make().split("---\n", 2)[2]
    assert "# my-merge\n" in body
    assert "[arXiv:2306.01708](https://arxiv.org/abs/2306.01708)" in body
    assert "* [org/base](https://huggingface.co/org/base)\n* `./local`\n" in body
    assert "291 tensors, 8,030,261,248 parameters, BF16." in body
    assert f"```yaml\n{RECIPE}```\n" in body


def test_recipe_with_a_fence_does_not_end_its_block():
    assert "````yaml\nx: |\n  ```\n  y\n````\n" in make(recipe_text="x: |\n  ```\n  y\n")


def test_local_folder_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert hub_names(["org/local", "org/there", "a/b/c", "name", "../x"]) == ("org/there",)


MIT = "---\nlicense: mit\n---\n# x\n"


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([MIT, MIT], {"license": "mit"}),
        ([MIT, "---\nlicense: apache-2.0\n---\n"], {}),
        ([MIT, None], {}),
        ([MIT, "# no front matter\n"], {}),
        ([MIT, "---\nlicense: [\n---\n"], {}),
        ([MIT, "---\n- license\n---\n"], {}),
        ([MIT, "---\nlicense: mit\ndate: 2026-99-99\n---\n"], {"license": "mit"}),
        ([MIT, "---\nlicense: no\n---\n"], {}),
        ([MIT, '---\nlicense: "mit\\x1b[0m"\n---\n'], {}),
        ([MIT, "---\r\nlicense: mit\r\n---\r\ntext"], {"license": "mit"}),
        (
            ["---\nlicense: other\nlicense_name: llama3\n---\n"] * 2,
            {"license": "other", "license_name": "llama3"},
        ),
        (["---\nlicense: other\nlicense_name: a\n---\n", "---\nlicense: other\nlicense_name: b\n---\n"], {}),
        ([], {}),
    ],
)
def test_licence_is_kept_where_all_inputs_agree(tmp_path, cards, expected):
    checkpoints = [write_readme(tmp_path / str(number), card) for number, card in enumerate(cards)]
    assert common_license([read_terms(each) for each in checkpoints]) == expected


def test_front_matter_of_a_card_is_safe_yaml():
    card = make(terms={"a": Terms({"license": "other", "license_name": "a: b # c"})})
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["license_name"] == "a: b # c"


@pytest.mark.parametrize(
    "value", ["!!bool maybe", '!!float ""', "!!int x", "!!timestamp x", "!!binary é", "!!python/x y"]
)
def test_odd_values_of_a_card_are_not_looked_at(value):
    assert parse_front_matter(f"---\na: {value}\nlicense: mit\n---\n")["license"] == "mit"


@pytest.mark.parametrize(
    "front", ['a: "\\UFFFFFFFF"', "%YAML 1." + "9" * 5000, "[" * 5000, "a: *b", "- license: mit", "a: b\n---\nc: d"]
)
def test_front_matter_that_cannot_be_read_is_none(front):
    assert parse_front_matter(f"---\n{front}\n---\n") in ({}, {"a": "b"})


def test_merge_keys_of_merge_keys_are_not_followed():
    names = "abcdefghijklmnop"
    lines = [f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in itertools.pairwise(names)]
    text = "\n".join(["---", "a: &a {k: v}", *lines, "license: mit", "---", ""])
    assert parse_front_matter(text) == {"license": "mit"}


def test_of_a_card_of_any_size_only_the_beginning_is_read(tmp_path):
    checkpoint = write_readme(tmp_path / "a", MIT)
    with open(tmp_path / "a" / "README.md", "ab") as file:
        file.truncate(1 << 40)
    assert read_terms(open_checkpoint(str(tmp_path / "a"))).license_fields == {"license": "mit"}
    assert checkpoint.files == ("README.md",)


def test_the_library_of_the_hub_takes_the_front_matter_and_finds_all_of_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    said = Terms({"license": "other", "license_name": "ours", "license_link": "LICENSE"}, False, {"language": ("en",)})
    card = hub.ModelCard(make(models=["org/base", "org/tuned"], terms={"a": said, "b": said}))
    data = hub.ModelCardData(**card.data.to_dict())
    assert data.base_model == ["org/base", "org/tuned"]
    assert (data.library_name, data.license, data.license_name, data.language) == (
        "transformers",
        "other",
        "ours",
        ["en"],
    )
    assert yaml.safe_load(data.to_yaml()) == yaml.safe_load(make_front(terms={"a": said, "b": said}))


def make_front(**changes: object) -> str:
    return make(models=["org/base", "org/tuned"], **changes).split("---\n")[1]


def test_usage_commits_and_terms_are_shown_and_a_repository_gives_its_name() -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    terms = {"org/base": Terms({"license": "mit"}, gated=True), "./local": Terms()}
    card = make(loader="AutoModelForCausalLM", commits={"org/base": sha}, terms=terms)
    assert f"[`0123456789ab`](https://huggingface.co/org/base/tree/{sha}), licence `mit`, gated\n" in card
    assert "* `./local`, says no licence\n" in card
    assert 'name = "."\n' in card
    named = name_card(card, "me/merged")
    assert "\n# merged\n" in named
    assert 'name = "me/merged"\n' in named
    assert named.split("---\n")[1] == card.split("---\n")[1]


def test_terms_are_read_from_cards_and_conflicts_are_told(tmp_path: Path) -> None:
    gated = "---\nlicense: llama3\nextra_gated_prompt: agree\nlanguage: [en, de]\ndatasets: a/b\n---\n"
    texts = {"a": gated, "b": MIT.replace("mit", "mit\nlanguage:\n- de\n- en"), "c": None}
    read = {name: read_terms(write_readme(tmp_path / name, text)) for name, text in texts.items()}
    assert read["a"] == Terms({"license": "llama3"}, True, {"language": ("en", "de"), "datasets": ("a/b",)})
    assert common_lists([read["a"], read["b"]]) == {"language": ("en", "de")}
    told = warn_of_terms(read, where="r.yml")
    assert [line.partition(" (")[0].partition(";")[0] for line in told] == [
        "r.yml: licences differ",
        "r.yml: no licence is said by c",
        "r.yml: gated: who downloads a agrees to terms",
    ]
    assert warn_of_terms({"a": read["b"], "b": read["b"]}, where="r.yml") == []
    assert warn_of_terms({"c": read["c"]}, where="r.yml") == []
