"""The models that candidates are made of, judged as these are, once for all runs of a search."""

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from mergemill.engine.errors import Cancelled, MergemillError
from mergemill.engine.recipe import ModelRef, Recipe
from mergemill.engine.recipe.stages import list_models
from mergemill.engine.runs.options import RunOptions
from mergemill.engine.search.candidate import evaluate_together, open_candidate
from mergemill.engine.search.drive import Hunt
from mergemill.engine.search.members import make_alone, read_back
from mergemill.engine.search.state import digest_of, write_file
from mergemill.engine.search.strategies.soup import MODELS
from mergemill.engine.search.trials import JudgedParent

PARENTS_NAME = "parents.json"


def judge_parents(hunt: Hunt, recipe: Recipe, place: Path, options: RunOptions) -> list[JudgedParent]:
    """Return the scores of the models of a recipe, noted in the search's folder so that they are judged once."""
    refs = dict(list_models(recipe))
    path, key = place / PARENTS_NAME, digest_of(sorted(refs))
    with suppress(FileNotFoundError, ValueError):
        noted = json.loads(path.read_bytes())
        if noted["of"] == key:
            return [JudgedParent(**each) for each in noted["parents"]]
    parents = _judge(hunt, refs, place, options)
    kept = [{"model": p.model, "score": p.score, "stderr": p.stderr, "holdout": p.holdout} for p in parents]
    write_file(path, json.dumps({"of": key, "parents": kept}, indent=1).encode())
    return parents


def _judge(hunt: Hunt, refs: Mapping[str, ModelRef], place: Path, options: RunOptions) -> list[JudgedParent]:
    with ExitStack() as stack:
        opened = [
            stack.enter_context(
                open_candidate(
                    f"parent-{number}", {MODELS: (name,)}, read_back(make_alone(ref), ""), place, options, hunt.judges
                )
            )
            for number, (name, ref) in enumerate(refs.items())
        ]
        if hunt.sources and len(opened) > 1:
            with suppress(MergemillError):
                evaluate_together(opened, hunt.sources)
        parents = []
        for name, candidate in zip(refs, opened, strict=True):
            try:
                judged = hunt.judge(candidate)
                holdout = hunt.holdout(candidate).score if hunt.holdout else None
                parents.append(JudgedParent(name, judged.score, judged.stderr, holdout))
            except Cancelled:
                raise
            except MergemillError:  # it is told as not judged
                parents.append(JudgedParent(name, None))
            finally:
                candidate.remove()
        return parents
