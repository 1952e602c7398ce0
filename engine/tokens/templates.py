"""Chat templates: the formats that recipes name, which one most models have, and whether one is Jinja at all.

The templates are ours, written from the formats' descriptions: ChatML (OpenAI's chat markup), Llama 3 (the model card's
"prompt format"), Mistral Instruct ([INST] … [/INST]), EXAONE ([|user|] …), Alpaca (Stanford Alpaca's prompts).
"""

import re
from collections.abc import Mapping
from typing import Any

from mergemill.engine.errors import PlanError

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = message['content'] | trim + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + state.system + message['content'] | trim + ' [/INST]' }}
{%- set state.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- else -%}
{{ raise_exception('roles are system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
"""
_EXAONE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}
{{ '[|' + message['role'] + '|]' + message['content'] }}
{%- if message['role'] == 'user' -%}{{ '\\n' }}{%- else -%}{{ '[|endofturn|]\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
"""
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- else -%}{{ raise_exception('roles are system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}

_LOOKS_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,60}\|>|\[\|[^|\[\]\s]{1,60}\|\]|\[/?[A-Z_]{2,30}\]|</?s>|<(?:start|end)_of_turn>"
)
# Tokens that end a turn, where a template has them: the first of these.
_STOPS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>", "[|endofturn|]", "<|end|>", "<|eot|>",
)  # fmt: skip


def is_template(text: str) -> bool:
    """Say whether a text is Jinja, and no name."""
    return "{{" in text or "{%" in text


def choose_most(templates: Mapping[str, str]) -> str | None:
    """Return the template that most models have, of equal counts the first; outer white space does not count.

    >>> choose_most({"a": "{{x}}", "b": "{{y}}", "c": " {{y}}\\n"}), choose_most({})
    ('{{y}}', None)
    """
    counts: dict[str, int] = {}
    for text in templates.values():
        counts[text.strip()] = counts.get(text.strip(), 0) + 1
    best = max(counts, key=lambda text: counts[text], default=None)
    return next((text for text in templates.values() if text.strip() == best), None)


def read_template(config: Mapping[str, Any]) -> str | None:
    """Return the chat template that a ``tokenizer_config.json`` holds; of several, the default one."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def check_template(text: str, where: str, *, given: bool) -> None:
    """Raise `PlanError` for what is no Jinja, as transformers would run it; it is not run.

    given: whether the recipe gives it. Another is anybody's and is taken apart, but not compiled: what of it is
    constant would be calculated then.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    environment = make_environment()
    try:
        if given:
            environment.from_string(text)
        else:
            environment.parse(text)
    except (TemplateError, RecursionError) as error:
        line = error.lineno if isinstance(error, TemplateSyntaxError) else None
        raise PlanError(
            f"{where}: chat_template is no Jinja{f' (its line {line})' if line else ''}: {error}"
        ) from error


def make_environment() -> Any:
    """Return Jinja's sandbox with what transformers adds to it; compiling in it calculates nothing.

    As it is, Jinja makes text of what is constant at once: of ``{{ "a" * 10 ** 10 }}`` ten gigabytes.
    """
    from jinja2 import pass_context
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says; what is inside it stands for it."""

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        optimized=False,
        finalize=pass_context(lambda _, value: value),  # which hangs on a context, so nothing is constant
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda how: ""}
    return environment


def list_special(text: str) -> list[str]:
    """Return what looks like a special token in a template, each once.

    >>> list_special("{{ '<|im_start|>' + x }}[INST]</s>")
    ['<|im_start|>', '[INST]', '</s>']
    """
    return list(dict.fromkeys(_LOOKS_SPECIAL.findall(text)))


def find_stop(text: str) -> str | None:
    """Return the token that a template ends a turn with; None where it is none that is known.

    >>> find_stop(TEMPLATES["llama3"]), find_stop(TEMPLATES["mistral"])
    ('<|eot_id|>', None)
    """
    return next((token for token in _STOPS if token in text), None)


def _refuse(message: str) -> str:
    raise ValueError(message)
