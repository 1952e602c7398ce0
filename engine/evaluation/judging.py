"""Judging models on rows of tokens, here or by workers, over which the rows are divided.

Rows go through a layer in the same small groups whoever judges them, so no score hangs on the number of workers or on
their memory.
"""

import math
import pickle
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mergemill.engine.errors import RunError
from mergemill.engine.evaluation.making import MadeTensors, open_made
from mergemill.engine.evaluation.memory import find_texts, keep_tied
from mergemill.engine.evaluation.passing import ShellLayout, find_layout, run_layers
from mergemill.engine.evaluation.scoring import Scores, score_states, score_whole
from mergemill.engine.evaluation.shell import Shell, open_shell
from mergemill.engine.evaluation.sums import RowSums, sum_rows
from mergemill.engine.evaluation.texts import ScoredTokens
from mergemill.engine.forward.skeleton import empty
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.calls import make_calls
from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.clusters.reach import choose_samples
from mergemill.engine.runs.crew import Crew, check_crew, find_workplace, open_crew
from mergemill.engine.runs.tasks.failures import WorkersDied
from mergemill.engine.runs.worker.options import WorkerOptions
from mergemill.engine.runs.worker.workers import choose_workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.lazy import torch

MEMORY = "4GiB"  # that may be taken where nothing is said
TOGETHER = 512  # tokens that go through a layer at a time, or one text; whatever the memory: scores must not hang on it


@dataclass(frozen=True, slots=True)
class JudgeJob:
    """Models, and the rows of tokens that they are judged on."""

    where: str
    """What is evaluated, for messages."""
    files: Mapping[str, bytes]
    """Config and tokenizer, by the names of their files."""
    plans: tuple[Plan, ...]
    tokens: ScoredTokens
    memory_bytes: int
    """That may be taken: half of it for reading."""
    storage: Storage
    whole: bool
    """Whether each model is in memory as a whole."""


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """What models make of rows of tokens, and how many bytes were read for each."""

    sums: tuple[RowSums, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Judges:
    """Workers that judge."""

    crew: Crew
    token: str
    """That the keys of their tasks hold."""


@contextmanager
def open_judges(plan: Plan, asked: WorkerOptions) -> Iterator[Judges | None]:
    """Start the workers that are asked for, or find them; None where this process judges.

    plan: of one of the models. asked: `memory` is each worker's.
    """
    if not (asked.workers or asked.scheduler or asked.cluster):
        yield None
        return
    memory = asked.memory if asked.memory is not None or asked.cluster else MEMORY
    chosen = choose_workers(plan, replace(asked, memory=memory))
    files = {pin.url: pin.size_bytes for pin in plan.pins if not is_remote(pin.url)}
    needs = Needs(files, choose_samples(plan.pins), "")
    check_crew(chosen, needs, lambda *_: None, asked.wait_s)
    token = secrets.token_hex(8)
    with open_crew(chosen, token) as crew:
        if chosen.cluster:
            crew.check_needs(needs)
        yield Judges(crew, token)


def judge_here(job: JudgeJob, lender: Workplace | None = None) -> JudgedRows:
    """Judge in this process; lender: of a worker, whose storage and cache it has."""
    storage, cache = (lender.storage, lender.cache) if lender else (job.storage, None)
    place = Workplace(job.memory_bytes // 2, 1, cache, storage=storage)
    with opened(job.files) as folder:
        shell = open_shell(folder, job.where)
    models = [open_made(plan, place) for plan in job.plans]
    layout = find_layout(shell, list(models[0].tensors))
    way = _judge_whole if job.whole else _judge_layers
    found = way(shell, layout, models, job.tokens, job.memory_bytes // 2)
    return JudgedRows(tuple(sum_rows(job.tokens, *each) for each in found), tuple(made.read_bytes for made in models))


def judge_there(job: JudgeJob, judges: Judges) -> JudgedRows:
    """Judge by workers, each of which has some of the rows; `RunError` where they die of it."""
    workers = judges.crew.workers
    job = replace(job, memory_bytes=workers.memory_bytes)
    parts = [replace(job, tokens=job.tokens.take(rows)) for rows in _divide(job.tokens, workers.count)]
    found: dict[int, JudgedRows] = {}

    def take(result: tuple[int, JudgedRows]) -> None:
        found[result[0]] = result[1]

    specs = [pickle.dumps((number, part)) for number, part in enumerate(parts)]
    try:
        name = f"judge-{secrets.token_hex(4)}"  # another than the last generation's
        judges.crew.run_tasks(make_calls(_judge_part, specs, name, judges.token), take)
    except WorkersDied as error:
        raise RunError(f"{job.where}: workers died while they judged it: give them more memory") from error
    each = [found[number] for number in range(len(parts))]
    sums = (
        RowSums(torch.cat([part.loss for part in parts]), torch.cat([part.entropy for part in parts]))
        for parts in zip(*(judged.sums for judged in each), strict=True)
    )
    return JudgedRows(tuple(sums), tuple(map(sum, zip(*(judged.reads for judged in each), strict=True))))


def _judge_part(spec: bytes) -> tuple[int, JudgedRows]:
    number, job = pickle.loads(spec)
    place = find_workplace()
    with place.lend(0, beside_bytes=place.memory_bytes):  # of all that the worker has: one judges at a time
        return number, judge_here(job, place)


def _divide(tokens: ScoredTokens, workers: int) -> list[slice]:
    """Return the rows of each worker: whole groups, as many for one as for another."""
    rows, step = len(tokens.ids), find_step(tokens)
    each = math.ceil(math.ceil(rows / step) / workers) * step
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def find_step(tokens: ScoredTokens) -> int:
    """Return how many rows go through a layer at a time."""
    return max(1, TOGETHER // tokens.ids.shape[1])


def _judge_layers(
    shell: Shell, layout: ShellLayout, models: Sequence[MadeTensors], tokens: ScoredTokens, memory_bytes: int
) -> list[Scores]:
    """Return loss and entropy of each position of each model, layer by layer, as many texts at once as memory holds."""
    rows = find_step(tokens)
    texts = find_texts(shell, layout, models, tokens, rows, memory_bytes)
    found: list[list[Scores]] = [[] for _ in models]
    for start in range(0, len(tokens.ids), texts):
        ids = tokens.ids[start : start + texts]
        labels = torch.roll(ids, -1, dims=1)
        with keep_tied(layout, models) as kept:
            hidden = run_layers(shell, layout, models, ids, rows, kept)
            with models[0].share(models[1:], layout.head) if kept is None else nullcontext(kept) as work:
                for place, made in enumerate(models):
                    own = hidden[place * len(ids) : (place + 1) * len(ids)]
                    found[place].append(score_states(shell, layout, made.make(layout.head, work), own, labels, rows))
    return [_join(each) for each in found]


def _judge_whole(
    shell: Shell, layout: ShellLayout, models: Sequence[MadeTensors], tokens: ScoredTokens, memory_bytes: int
) -> list[Scores]:
    """Return the same of models that are in memory as a whole, one after the other."""
    found = []
    for made in models:
        shell.fill_whole(made.make(made.tensors))
        rows = [tokens.ids[start : start + 1] for start in range(len(tokens.ids))]
        found.append(_join([score_whole(shell, ids, torch.roll(ids, -1, dims=1)) for ids in rows]))
        empty(shell.model)
    return found


def _join(parts: Sequence[Scores]) -> Scores:
    return torch.cat([loss for loss, _ in parts]), torch.cat([entropy for _, entropy in parts])


@contextmanager
def opened(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a folder that holds the files."""
    with tempfile.TemporaryDirectory(prefix="mergemill-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)
