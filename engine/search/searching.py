"""A search of a search file: what is asked for is checked and planned, then driven."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mergemill.engine.errors import InputError, OutputError, PlanError, RecipeError
from mergemill.engine.evaluation.judging import open_judges
from mergemill.engine.evaluation.texts import read_text
from mergemill.engine.plan.make import make_plan
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import Recipe
from mergemill.engine.recipe.genomes import make_genes, make_genome_recipe
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import SearchFile, Variable, Variables, load_search
from mergemill.engine.recipe.templates import (
    Template,
    Values,
    check_variables,
    read_template,
    write_documents,
)
from mergemill.engine.runs.inspect import inspect
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.search.best import make_section, write_model
from mergemill.engine.search.drive import Found, Hunt, OnTrial, drive_search, ignore
from mergemill.engine.search.judge import list_items, make_judge
from mergemill.engine.search.judge import list_sources as list_texts
from mergemill.engine.search.parents import judge_parents
from mergemill.engine.search.space import Space
from mergemill.engine.search.state import SearchRecord, held, list_sources, open_state
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.storage.urls import parse_path


def run_search(
    given: SearchFile | str | Path | Mapping[str, Any],
    folder: str | Path,
    *,
    evaluations: int | None = None,
    write: bool = False,
    on_benchmarks: bool = False,
    on_trial: OnTrial = ignore,
    **options: Unpack[RunKeywords],
) -> Found:
    """Search what a search file says, in `folder`, which is new, empty, or holds the same search unfinished.

    evaluations: instead of the file's. write: merge the best into ``folder/model`` at the end. on_benchmarks: whether
    it may search on test sets of public benchmarks. options: of candidates, see `RunOptions`. Raises `InputError`
    before anything is written, `RunError` for what fails later.
    """
    file = given if isinstance(given, SearchFile) else load_search(given)
    if evaluations is not None:
        file = file.model_copy(update={"budget": file.budget.model_copy(update={"evaluations": evaluations})})
    asked, place = RunOptions(**options), parse_path(folder, OutputError, what="a search")
    if not on_benchmarks:
        _check_benchmarks(file)
    template, space = open_space(file)
    check_variables(template, list(space.variables))
    asking = make_asking(file, space)
    hunt = make_hunt(file, template.fill, f"A search by {file.strategy.name}")
    plans = [_plan_corner(template, values, asked) for values in space.corners()]
    record = _record(file, write_documents([each.data for each in template.documents]), plans)
    with held(place), judging(hunt, plans[0], asked) as hunt:
        open_state(place, record)
        if hunt.sources and all(each is None or each.by_text for each in (file.objective, file.holdout)):
            parents = judge_parents(hunt, template.fill(space.to_values(space.start)), place, asked)
            hunt = replace(hunt, parents=parents)
        found = drive_search(hunt, asking, place, asked, on_trial)
        if write and found.best is not None:
            _write_best(file, hunt, template.fill(found.best.values), found, record, place, asked)
    return found


def _check_benchmarks(file: SearchFile) -> None:
    """Raise `PlanError` where the objective is a benchmark: what is searched on its test set says nothing after."""
    if file.objective is not None and file.objective.benchmarks:
        named = ", ".join(file.objective.benchmarks)
        raise PlanError(
            f"{file.name}: {named}: a test set of a public benchmark, of which scores say nothing once it was searched "
            "on; take another task, or say --on-benchmarks, and the model's card will tell"
        )


def _write_best(
    file: SearchFile, hunt: Hunt, recipe: Recipe, found: Found, record: SearchRecord, place: Path, asked: RunOptions
) -> None:
    """Merge the best, with a card that says how its parents do."""
    assert file.objective is not None
    parents = judge_parents(hunt, recipe, place, asked)
    section = make_section(file.objective, record.texts, found, parents, hunt.sign)
    write_model(plan_candidate(recipe, asked), section, place, asked)


def open_space(file: SearchFile) -> tuple[Template, Space]:
    """Return the recipe with its variables, and the box of these; a genome's follow from its first model's layers."""
    if file.genome is None:
        return read_template(file.recipe), Space(file.variables)
    model, found = file.genome.models[0], inspect(str(file.genome.models[0])).layers
    if len(found) != 1:
        raise PlanError(f"{file.name}: {model}: a genome is of models with one stack of layers; here are {len(found)}")
    (layers,) = found.values()
    try:
        genes = make_genes(file.genome, layers)
        template = read_template(make_genome_recipe(file.genome, layers))
    except ValueError as error:  # of pydantic: the genome does not go with the model
        raise RecipeError(f"{file.name}: {_first_fault(error)}") from None
    if file.random_init:
        genes = _draw_starts(genes, file.strategy.seed)
    return template, Space(Variables({name: Variable.model_validate(gene) for name, gene in genes.items()}))


def _first_fault(error: ValueError) -> str:
    fault = error.errors()[0]  # type: ignore[attr-defined]
    return f"'{fault['loc'][-1]}' {fault['msg']}"


def _draw_starts(genes: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, dict[str, float]]:
    import random

    draw = random.Random(seed)
    return {name: {**gene, "start": draw.random()} for name, gene in genes.items()}


def make_asking(file: SearchFile, space: Space) -> Asking:
    """Return the strategy of a search."""
    from mergemill.engine.search.strategies.drawn import ask_grid, ask_random, ask_sobol
    from mergemill.engine.search.strategies.line import ask_line

    said = file.strategy
    if said.name == "cma":
        if space.size < 2:
            raise PlanError(f"{file.name}: cma searches two numbers or more; for one write strategy: {{name: line}}")
        from mergemill.engine.search.strategies.cma import ask_cma, load_cmaes

        load_cmaes()
        return ask_cma(space, said.seed, said.population, said.sigma)
    if said.name == "tpe":
        from mergemill.engine.search.strategies.by_optuna import load_optuna
        from mergemill.engine.search.strategies.tpe import ask_tpe

        load_optuna("tpe")
        return ask_tpe(space, said.seed)
    if said.name == "nsga2":
        from mergemill.engine.search.strategies.by_optuna import load_optuna
        from mergemill.engine.search.strategies.nsga2 import ask_nsga2

        load_optuna("nsga2")
        assert file.objective is not None
        return ask_nsga2(space, said.seed, said.population, len(file.objective.sum or ()))
    if said.name == "line":
        if space.size != 1:
            raise PlanError(f"{file.name}: line searches one number; here are {space.size}")
        return ask_line(space)
    if said.name == "grid":
        return ask_grid(space, said.steps)
    return (ask_sobol if said.name == "sobol" else ask_random)(space, said.seed)


@contextmanager
def judging(hunt: Hunt, plan: Plan, asked: RunOptions) -> Iterator[Hunt]:
    """Yield the hunt with workers that judge, where it is by texts and they are asked for.

    plan: of one of the candidates.
    """
    if not hunt.sources:
        yield hunt
        return
    with open_judges(plan, asked) as judges:
        yield replace(hunt, judges=judges)


def make_hunt(file: SearchFile, fill: Any, title: str) -> Hunt:
    assert file.objective is not None
    judge = make_judge(file.objective, file.name)
    holdout = make_judge(file.holdout, file.name) if file.holdout else None
    texts = list_texts([file.objective, file.holdout])
    (raced,) = list_texts([file.objective]) if file.strategy.racing else (None,)
    return Hunt(
        fill,
        judge,
        holdout,
        texts,
        raced,
        file.objective.sign,
        file.budget,
        title,
        items=list_items(file.objective),
        by_items=file.strategy.name == "nsga2",
    )


def plan_candidate(recipe: Recipe, asked: RunOptions) -> Plan:
    return make_plan(recipe, storage=asked.find_storage())


def _plan_corner(template: Template, values: Values, asked: RunOptions) -> Plan:
    """Plan a corner of the box; an error says with which values."""
    try:
        return plan_candidate(template.fill(values), asked)
    except InputError as error:
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        raise type(error)(f"{error} (with {told}, a corner of the search's box)") from None


def _record(file: SearchFile, recipe: str, plans: Sequence[Plan]) -> SearchRecord:
    said = file.model_dump(mode="json", exclude_none=True, exclude={"budget", "recipe"})
    sources = {name: found for plan in plans for name, found in list_sources(plan.pins).items()}
    return SearchRecord(said, recipe, sources, digest_texts([file.objective, file.holdout]))


def digest_texts(objectives: Sequence[Objective | None]) -> dict[str, str]:
    """Return the files that objectives read, with their checksums; `InputError` where one cannot be read."""
    paths = [path for objective in objectives if objective for path in objective.files]
    return {path: hashlib.sha256(read_text(path).encode()).hexdigest() for path in paths}
