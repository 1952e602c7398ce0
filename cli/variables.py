"""Every option from the environment: ``--memory`` is also ``MERGEMILL_MEMORY``, and of one command alone
``MERGEMILL_MERGE_MEMORY``.

In one place (2026-11-29), over the commands as they are put together, so that no option can be forgotten. What is typed
is stronger, and of two variables that of the command. A switch takes 1 and 0; an option that may come several times
takes its values with spaces between. `--help` and `--version` have none.

A variable that nothing reads is told where its name is near to one (2026-11-30); another may be some other program's.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import typer

PREFIX = "MERGEMILL"
OTHERS = ("MERGEMILL_DEBUG", "MERGEMILL_NATIVE", "MERGEMILL_RESUME")  # which are of no option
_NEAR = 0.8  # of 1.0: as alike as a word with a letter or two that are wrong


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


def list_variables(command: Any) -> Iterator[str]:
    """Yield the variables of a command's options, and of those below it."""
    for option in list_options(command):
        yield from option.envvar
    for each in getattr(command, "commands", {}).values():
        yield from list_variables(each)


def find_misspelt(given: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each variable of ours that is none, but almost one.

    >>> list(find_misspelt(["MERGEMILL_MEMROY", "MERGEMILL_RUNNER", "HOME"], ["MERGEMILL_MEMORY"]))
    ["MERGEMILL_MEMROY is no variable of mergemill; did you mean 'MERGEMILL_MEMORY'?"]
    """
    start = f"{PREFIX}_"
    words = sorted({name.removeprefix(start) for name in (*known, *OTHERS)})
    for name in sorted(name for name in given if name.startswith(start)):
        word = name.removeprefix(start)
        if word not in words and (near := get_close_matches(word, words, n=1, cutoff=_NEAR)):
            yield f"{name} is no variable of mergemill; did you mean '{start}{near[0]}'?"


def find_given(context: typer.Context) -> Iterator[tuple[Any, str]]:
    """Yield each option that the environment gives, and the variable that does."""
    for option in list_options(context.command):
        source = context.get_parameter_source(option.name)
        if source is not None and source.name == "ENVIRONMENT":
            yield option, next(name for name in option.envvar if os.environ.get(name))


def name_source(context: typer.Context, message: str) -> str:
    """Return an error's message with the variable's name, where that gave what is wrong: its option or value leads."""
    for option, variable in find_given(context):
        name = next((each for each in option.opts if re.match(rf"{each}(?![\w-])", message)), "")
        if name:
            return variable + message.removeprefix(name)
        value = context.params.get(option.name)
        if any(message.startswith(f"{each}: ") for each in (value if isinstance(value, list) else [value])):
            return f"{variable}: {message}"
    return message


def list_words(context: typer.Context) -> list[str]:
    """Return a command line's words, and after them those options that the environment gave.

    A command that is repeated elsewhere would not find them there.
    """
    words: list[str] = list(context.obj or sys.argv[1:])
    end = words.index("--") if "--" in words else len(words)  # behind it nothing is an option
    given: list[str] = []
    for option, _ in find_given(context):
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
