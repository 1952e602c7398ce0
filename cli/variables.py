"""Every option from the environment: ``--memory`` is also ``MERGEMILL_MEMORY``, and of one command alone
``MERGEMILL_MERGE_MEMORY``.

In one place (2026-11-29), over the commands as they are put together, so that no option can be forgotten. What is typed
is stronger, and of two variables that of the command. A switch takes 1 and 0; an option that may come several times
takes its values with spaces between. `--help` and `--version` have none.
"""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

import typer

PREFIX = "MERGEMILL"


def name_variables(command: Any, *above: str) -> None:
    """Give each option of a command, and of those below it, its two variables beside what it has; in place."""
    for option in list_options(command):
        own = [option.envvar] if isinstance(option.envvar, str) else [*(option.envvar or ())]
        option.envvar = [_join(*above, option.name), _join(option.name), *own]
        option.show_envvar = False  # a line for all stands below the options
    for name, each in getattr(command, "commands", {}).items():
        name_variables(each, *above, name)


def list_options(command: Any) -> Iterator[Any]:
    """Yield the options of a command that a variable may stand for: those that do not end it at once."""
    for each in command.params:
        if each.param_type_name == "option" and not each.is_eager:
            yield each


def _join(*names: str) -> str:
    """Return the name of a variable.

    >>> _join("extract-lora", "max_rank")
    'MERGEMILL_EXTRACT_LORA_MAX_RANK'
    """
    return "_".join([PREFIX, *names]).upper().replace("-", "_")


def list_words(context: typer.Context) -> list[str]:
    """Return a command line's words, and after them those options that the environment gave.

    A command that is repeated elsewhere would not find them there.
    """
    words: list[str] = list(context.obj or sys.argv[1:])
    end = words.index("--") if "--" in words else len(words)  # behind it nothing is an option
    given: list[str] = []
    for option in list_options(context.command):
        source = context.get_parameter_source(option.name)
        if source is not None and source.name == "ENVIRONMENT":
            given += _say_option(option, context.params[option.name])
    return [*words[:end], *given, *words[end:]]


def _say_option(option: Any, value: Any) -> Iterator[str]:
    """Yield the words that give an option this value."""
    name = next(each for each in (*option.opts, "") if each.startswith("--"))
    if isinstance(value, bool):
        yield from [name] if value else option.secondary_opts[:1]
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield from (name, str(each))


def say_again(context: typer.Context) -> str:
    """Return the command that does the same again, from here and from wherever the environment says nothing.

    Example: ``mergemill merge recipe.yml merged --memory 2GiB``.
    """
    return shlex.join(["mergemill", *list_words(context)])
