"""The best of a search as a model, whose card says on what it was searched and how its parents do on the same.

That is read from the card alone: a score that was searched on is no measure of a model, and one that a parent reaches
as well is no gain.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergemill.engine.plan.small_files import CARD_NAME
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.runs.running import run_as
from mergemill.engine.search.drive import Found
from mergemill.engine.search.report import say_number
from mergemill.engine.search.state import MODEL
from mergemill.engine.search.trials import JudgedParent, Trial
from mergemill.engine.storage.store import make_storage

ERRORS = 2.0  # standard errors, within which two scores are alike
AFTER = "made with mergemill."


def write_model(plan: Plan, card: str, place: Path, options: RunOptions) -> None:
    """Merge the best into the search's folder `place`, with its card; one of an earlier best is removed before.

    card: the section on the search.
    """
    plan = _with_card(plan, card)
    out = place / MODEL
    there = find_output(str(out), make_storage(options.find_storage())).read_record() if out.is_dir() else None
    if there is not None and there.digest != plan.digest:
        shutil.rmtree(out)  # another best of this search, which went on
    run_as(plan, out, options)


def _with_card(plan: Plan, card: str) -> Plan:
    """Return the plan with the section in its card, and so with another digest."""
    files = tuple(
        replace(file, data=_insert(file.data.decode(), card).encode()) if file.name == CARD_NAME and file.data else file
        for file in plan.files
    )
    digest = hashlib.sha256(f"{plan.digest}\n{card}".encode()).hexdigest()
    return replace(plan, files=files, digest=digest)


def _insert(text: str, card: str) -> str:
    """Put a section after the card's first sentence."""
    before, sentence, after = text.partition(AFTER)
    return f"{before}{sentence}\n\n{card}{after}"


def make_section(
    objective: Objective, texts: Mapping[str, str], found: Found, parents: Sequence[JudgedParent], sign: int
) -> str:
    """Return what a card says of a search; its first line says so where a parent does as well.

    texts: files that were read, with their sha256.
    """
    best = found.best
    assert best is not None
    alike = [parent.model for parent in parents if is_alike(best, parent, sign)]
    lines = [f"**On what it was searched on, it is no better than {', '.join(alike)}.**", ""] if alike else []
    failed = sum(trial.score is None for trial in found.trials)
    judged = f"{len(found.trials):,} candidates were judged" + (f", of which {failed} failed" if failed else "")
    said = objective.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    lines += ["## Search", "", f"{judged}, by `{json.dumps(_shorten(said), ensure_ascii=False)}`; the best was kept."]
    if objective.benchmarks:
        named = ", ".join(objective.benchmarks)
        lines += [
            "",
            f"**It was searched on test sets of public benchmarks, so its scores on them say little: {named}.**",
        ]
    lines += [f"* `{Path(path).name}`, sha256 `{checksum}`" for path, checksum in texts.items()]
    lines += ["", "| model | score | hold-out |", "| --- | --- | --- |"]
    rows = [("this one", best.score, best.stderr, best.holdout)]
    rows += [(f"`{Path(each.model).name}`", each.score, each.stderr, each.holdout) for each in parents]
    for name, score, stderr, holdout in rows:
        error = f" ± {stderr:.2g}" if stderr is not None else ""
        lines.append(f"| {name} | {say_number(score) or 'not judged'}{error} | {say_number(holdout)} |")
    return "\n".join(lines)


def is_alike(best: Trial, parent: JudgedParent, sign: int) -> bool:
    """Whether a parent is as good as the best, or within two standard errors of it.

    >>> made = Trial(0, 0, {}, "", "scored", 7.0, 0.1)
    >>> [is_alike(made, JudgedParent("a", score, 0.1), 1) for score in (6.9, 7.2, 7.5, None)]
    [True, True, False, False]
    """
    if parent.score is None or best.score is None:
        return False
    error = ((best.stderr or 0.0) ** 2 + (parent.stderr or 0.0) ** 2) ** 0.5
    return bool(sign * (parent.score - best.score) <= ERRORS * error)


def _shorten(said: object) -> object:
    """Return what is said with the last name alone of each path: a card is for all."""
    if isinstance(said, dict):
        return {key: _shorten(value) for key, value in said.items()}
    if isinstance(said, list):
        return [_shorten(each) for each in said]
    return Path(said).name if isinstance(said, str) and said.startswith("/") else said
