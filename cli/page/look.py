"""What a recipe's text means now: its form, what is wrong at which line, and the plan. No weight is read."""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

from mergemill.cli import console
from mergemill.cli.options import SHARD_SIZE
from mergemill.cli.page.form import MOST_CHARACTERS, NoForm, make_form
from mergemill.cli.page.roots import check_recipe, confine, find_files, say_files
from mergemill.cli.page.settings import Chosen, Setup
from mergemill.cli.plan import token_lines
from mergemill.engine import (
    check_output,
    describe_plan,
    errors,
    format_size,
    load_cluster,
    make_adapter_plan,
    make_plan,
    make_recipe,
    parse_adapters,
    read_recipe,
    values,
)

MOST_TOKENS = 300  # lines of them
_LINE = re.compile(r"(?:the )?recipe:(\d+): ")
_PLANNING = threading.Lock()  # one plan at a time, however many browsers look


def look(text: str, out: str, chosen: Chosen, setup: Setup) -> dict[str, Any]:
    """Return the form, and the plan or what is in its way, as JSON values."""
    found: dict[str, Any] = {"form": None, "why_no_form": "", "plan": None, "error": None, "empty": not text.strip()}
    try:
        with _PLANNING:
            documents = [] if found["empty"] else read_text(text)
            try:
                found["form"] = asdict(make_form([each.data for each in documents], text))
            except NoForm as error:
                found["why_no_form"] = str(error)
            if documents:
                plan = _plan(text, documents, chosen, setup)
                found["plan"] = _describe(plan, out, chosen, setup)
                if out and "://" not in out:  # storage is asked at the start alone
                    found["option_error"] = _find_occupied(plan, out, chosen, setup)
    except (errors.MergemillError, OSError) as error:
        found["error"] = describe_error(error, text)
        found["why_no_form"] = found["why_no_form"] or ("" if found["form"] else "the YAML cannot be read")
    return found


def read_text(text: str) -> list[Any]:
    """Return the documents of a recipe's text, which is read this once; `RecipeError` where it is too long, or no YAML.

    Reading takes about 25 µs a character at worst, so the bound is less than that of a recipe's file.
    """
    if len(text) > MOST_CHARACTERS:
        raise errors.RecipeError(f"the recipe is longer than this page takes, {MOST_CHARACTERS >> 10} KiB")
    return read_recipe(text)


def check_text(text: str, setup: Setup) -> None:
    """Raise `InputError` for a recipe's text that the page may not run."""
    take_recipe(text, read_text(text), setup)


def take_recipe(text: str, documents: list[Any], setup: Setup) -> "values.AnyRecipe | values.AdapterRecipe":
    """Return the recipe that documents say; `InputError` for one with files or models out of the page's reach.

    Files are looked for in the data, whatever the text looks like, before anything that it names is read or run.
    """
    for document in documents:
        for path in find_files(document.data):
            raise errors.RecipeError(f"recipe:{document.lines[path]}: {say_files(str(path[-1]))}")
    first = documents[0].data if documents else None
    joins = isinstance(first, dict) and "adapters" in first
    recipe = parse_adapters(text, name="recipe") if joins else make_recipe(documents, text)
    check_recipe(setup.root, recipe)
    return recipe


def plan_text(text: str, chosen: Chosen, setup: Setup) -> "values.Plan":
    """Return the plan of a recipe's text; `InputError` says what is wrong, or out of the page's reach."""
    return _plan(text, read_text(text), chosen, setup)


def _plan(text: str, documents: list[Any], chosen: Chosen, setup: Setup) -> "values.Plan":
    recipe = take_recipe(text, documents, setup)
    storage = load_cluster(setup.cluster).storage if setup.cluster else None
    shard_size = chosen.shard_size or SHARD_SIZE
    if isinstance(recipe, values.AdapterRecipe):
        plan = make_adapter_plan(recipe, seed=chosen.seed, storage=storage)
    else:
        plan = make_plan(recipe, seed=chosen.seed, shard_size=shard_size, methods=setup.methods, storage=storage)
    for pin in plan.pins:
        if "://" not in pin.url:
            confine(setup.root, pin.url)
    return plan


def is_reportable(plan: "values.Plan") -> bool:
    """Whether a page of what the merge changed, or of what a router does, can be made."""
    return plan.origin.kind == "merge" or plan.gates is not None


def make_crew(chosen: Chosen, setup: Setup) -> "values.WorkerKeywords":
    """Return the options of the workers of a run."""
    return {
        "memory": chosen.memory or None,
        "workers": chosen.workers,
        "threads": chosen.threads,
        "scheduler": setup.scheduler or None,
        "cluster": load_cluster(setup.cluster) if setup.cluster else None,
    }


def _find_occupied(plan: "values.Plan", out: str, chosen: Chosen, setup: Setup) -> str:
    """Say why a folder cannot become an output; empty where it can."""
    try:
        check_output(plan, out, **make_crew(chosen, setup))
    except errors.MergemillError as error:
        return str(error)
    return ""


def describe_error(error: BaseException, text: str = "") -> dict[str, Any]:
    """Return an error as JSON values: its message, and the places in the text that are wrong."""
    message = console.explain(error)
    faults = [asdict(fault) for fault in getattr(error, "faults", ())]
    if not faults and text:
        faults = list(_find_places(message, text))
    return {"message": _LINE.sub(r"line \1: ", message, count=1).removeprefix("recipe: "), "faults": faults}


def _find_places(message: str, text: str) -> Iterator[dict[str, Any]]:
    """Yield the line that a message names; else the first that holds what the message begins with, as a model."""
    lines = text.splitlines() or [""]
    if told := _LINE.match(message):
        number = min(int(told[1]), len(lines))
        shown = lines[number - 1]
        inner = shown.strip()
        column, words = shown.find(inner), message[told.end() :]
        yield {"words": words, "line": number, "text": shown, "column": column, "width": max(1, len(inner))}
        return
    for subject in (part for part in re.split(r"[:;,] ", message)[:3] if len(part) > 1):
        for number, line in enumerate(lines, 1):
            if (column := line.find(subject)) >= 0:
                yield {"words": message, "line": number, "text": line, "column": column, "width": len(subject)}
                return


def _describe(plan: "values.Plan", out: str, chosen: Chosen, setup: Setup) -> dict[str, Any]:
    numbers = describe_plan(plan, out=out or None, **make_crew(chosen, setup))
    return {
        "facts": list(_list_facts(numbers, plan)),
        "sources": [_describe_source(source) for source in numbers["sources"]],
        "tokens": list(islice(token_lines(asdict(plan.tokens)), MOST_TOKENS)) if plan.tokens else [],
        "warnings": numbers["warnings"],
        "reportable": is_reportable(plan),
    }


def _list_facts(numbers: Mapping[str, Any], plan: "values.Plan") -> Iterator[tuple[str, str]]:
    yield "method", numbers["method"]
    yield "reads", format_size(numbers["read_bytes"])
    if numbers["first_pass_bytes"]:
        yield "reads before", f"{format_size(numbers['first_pass_bytes'])}, for the coefficients' norms"
    shards, parts = console.count(len(numbers["shards"]), "shard"), console.count(numbers["parts"], "part")
    yield "writes", f"{format_size(numbers['write_bytes'])}: {numbers['tensors']:,} tensors in {shards}, {parts}"
    projected, promised = format_size(numbers["projected_bytes"]), format_size(numbers["memory_bytes"])
    yield "memory", f"{projected} at most, of {promised} promised to each worker"
    workers, threads = console.count(numbers["workers"], "worker"), console.count(numbers["threads"], "thread")
    place = numbers["scheduler"] or numbers["cluster"]
    yield "workers", f"those of {place}" if place else f"{workers} of {threads}"
    yield "dtype", numbers["dtype"]
    if numbers["donor"]:
        yield "config", f"of {numbers['donor']}"
    yield "tokens", _say_tokens(plan)
    for each in numbers["remote"]:
        requests = each["read_requests"] + each["write_requests"]
        moved = format_size(each["read_bytes"] + each["write_bytes"])
        yield each["scheme"], f"{moved} in about {console.count(requests, 'request')}"
    yield "digest", numbers["digest"][:12]


def _say_tokens(plan: "values.Plan") -> str:
    if plan.tokens is None:
        return "as the models have them"
    added = console.count(len(plan.tokens.added), "new token")
    return f"those of {plan.tokens.source}, {added}, {console.count(len(plan.tokens.rows), 'row')} made for models"


def _describe_source(source: Mapping[str, Any]) -> dict[str, str]:
    dropped = sum(source["dropped"].values())
    uses = [f"{source['merged']:,} merged", f"{source['copied']:,} copied", f"{dropped:,} left out"]
    used = [use for use in uses if not use.startswith("0 ")]
    read = "computed on the way" if source["is_stage"] else format_size(source["read_bytes"])
    return {"model": source["model"], "read": read, "use": ", ".join(used) or "not used"}
