"""Chat templates of ours against the formats' published examples, and what is told of anybody's."""

from typing import Any

import pytest

from mergemill.engine.errors import PlanError
from mergemill.engine.tokens.templates import (
    TEMPLATES,
    check_template,
    choose_most,
    find_stop,
    list_special,
    make_environment,
    read_template,
)

TURNS = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye."},
]
# ChatML: OpenAI's chatml.md; Llama 3: Meta's "Model Cards & Prompt formats"; Mistral: the instruct models' cards;
# EXAONE: the card of EXAONE-3.0-7.8B-Instruct; Alpaca: the prompts of stanford_alpaca.
PUBLISHED = {
    "chatml": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are helpful.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] You are helpful.\n\nHello! [/INST] Hi.</s>[INST] Bye. [/INST]",
    "exaone": (
        "[|system|]You are helpful.[|endofturn|]\n[|user|]Hello!\n[|assistant|]Hi.[|endofturn|]\n[|user|]Bye.\n"
        "[|assistant|]"
    ),
    "alpaca": (
        "You are helpful.\n\n### Instruction:\nHello!\n\n### Response:\nHi.</s>\n\n### Instruction:\nBye.\n\n"
        "### Response:\n"
    ),
}


def render(template: str, turns: Any = TURNS) -> str:
    found = make_environment().from_string(template)
    return str(found.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_the_format_is_published(name: str) -> None:
    assert render(TEMPLATES[name]) == PUBLISHED[name]
    check_template(TEMPLATES[name], "recipe.yml", given=True)


def test_exaone_without_a_system_turn_begins_with_an_empty_one() -> None:
    assert render(TEMPLATES["exaone"], TURNS[1:2]) == "[|system|][|endofturn|]\n[|user|]Hello!\n[|assistant|]"


def test_a_template_that_no_loader_could_compile_is_refused_with_its_line() -> None:
    with pytest.raises(PlanError, match=r"recipe\.yml: chat_template is no Jinja \(its line 2\)"):
        check_template("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "recipe.yml", given=True)
    with pytest.raises(PlanError, match="No filter named 'nothing'"):
        check_template("{{ messages | nothing }}", "recipe.yml", given=True)
    check_template(
        "{%- for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}",
        "x",
        given=True,
    )


def test_what_is_constant_in_the_recipes_template_is_not_calculated() -> None:
    check_template('{{ "a" * 10**11 }}{{ "b" ~ "c" * 10**11 }}{{ messages }}', "here", given=True)
    assert render("{{ 'a' * 3 ~ 1 }}", []) == "aaa1"


def test_another_models_template_is_not_calculated_with() -> None:
    """What is constant in a template is calculated when it is compiled: this one would take all memory."""
    check_template("{{ 'a' * 10 ** 12 }}", "recipe.yml", given=False)


def test_the_end_of_a_turn_and_special_tokens_are_seen_in_the_text() -> None:
    ends = {name: find_stop(text) for name, text in TEMPLATES.items()}
    assert ends == {
        "alpaca": None, "chatml": "<|im_end|>", "exaone": "[|endofturn|]", "llama3": "<|eot_id|>", "mistral": None,
    }  # fmt: skip
    assert list_special(TEMPLATES["chatml"]) == ["<|im_start|>", "<|im_end|>"]
    assert list_special("<start_of_turn>user {{ a | b }}") == ["<start_of_turn>"]


def test_the_template_of_most_models_is_chosen_and_of_several_the_default() -> None:
    assert choose_most({"a": "x", "b": " y ", "c": "y"}) == " y "
    assert choose_most({"a": "x", "b": "y"}) == "x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_template({"chat_template": named}) == "d"
    assert read_template({"chat_template": "  "}) is None
    assert read_template({}) is None
