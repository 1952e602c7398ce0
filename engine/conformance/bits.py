"""Claims about the same bits: however a tensor is cut, by however many threads, kept or read again."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergemill.engine.conformance.claim import Cases, Check, each, once, variants
from mergemill.engine.conformance.mill import Mill, Settings, bits_of
from mergemill.engine.conformance.subject import Subject
from mergemill.engine.conformance.values import values_for
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.rounds import Round, finish_rounds
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Workspace


def inputs_are_not_changed(mill: Mill, subject: Subject) -> None:
    """A method may overwrite its slabs, and nothing that they were decoded from."""
    expression = mill.express(subject.make_task(values_for(subject, (2 * BLOCK,))))
    file = Path(next(expression.reads(Span(0, 1))).pin.url)
    stored, span = file.read_bytes(), Span(0, 2 * BLOCK)
    work = Workspace(np.empty(2 * len(stored) + (16 << 20), np.uint8), keep=True)

    def gather(asked: Round) -> Partial:
        work.next_slab()
        return asked.take(span, work, ())

    ready = finish_rounds(expression.rounds(), (), gather)
    work.next_slab()
    ready.slab(span, work, expression.dtype)
    for read in expression.reads(span):
        kept = bytes(work.read(read.pin, read.offset_bytes, read.size_bytes).numpy())
        assert kept == stored[read.offset_bytes : read.offset_bytes + read.size_bytes], "an input was overwritten"
    assert work.read_bytes == sum(read.size_bytes for read in expression.reads(span)), "read once and kept"
    assert file.read_bytes() == stored


def the_same_task_gives_the_same_bits(mill: Mill, subject: Subject) -> None:
    """Nothing is left from one run to the next."""
    task = subject.make_task(values_for(subject, (300, 300)))
    assert bits_of(mill.merge(task)) == bits_of(mill.merge(task))


def any_slab_gives_the_same_bits(mill: Mill, subject: Subject, dtype: torch.dtype) -> None:
    """A slab may be one block or seven."""
    expression = mill.express(subject.make_task(values_for(subject, (8 * BLOCK + 5,), dtype=dtype)))
    results = {bits_of(mill.run(expression, slab=blocks * BLOCK)) for blocks in (1, 2, 3, 7)}
    assert len(results) == 1, "slabs of 1, 2, 3 and 7 blocks give different bits"


def any_cut_into_parts_gives_the_same_bits(mill: Mill, subject: Subject, variant: Settings) -> None:
    """Parts gather their statistics apart, which are added up in any order."""
    values = values_for(subject, (4 * BLOCK + 5,), dtype=torch.bfloat16)
    expression = mill.express(subject.make_task(values, variant))
    whole = bits_of(mill.run(expression, out="BF16"))
    assert bits_of(mill.run(expression, out="BF16", parts=2)) == whole
    assert bits_of(mill.run(expression, out="BF16", parts=5, slab=BLOCK)) == whole


def keeping_the_inputs_between_passes_gives_the_same_bits(mill: Mill, subject: Subject) -> None:
    """Reading again or not is a matter of memory alone."""
    expression = mill.express(subject.make_task(values_for(subject, (3 * BLOCK + 5,))))
    assert bits_of(mill.run(expression, keep=True)) == bits_of(mill.run(expression, keep=False))


def threads_of_torch_change_nothing(mill: Mill, subject: Subject) -> None:
    """A worker has one thread a task, a notebook has more."""
    expression = mill.express(subject.make_task(values_for(subject, (3 * BLOCK + 5,))))
    before = torch.get_num_threads()
    try:
        results = set()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.add(bits_of(mill.run(expression)))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


def seed_tensor_and_place_matter_to_random_methods_alone(mill: Mill, subject: Subject) -> None:
    """Random numbers hang on nothing else, and others' results on none of these."""
    task = subject.make_task(values_for(subject, (100, 100)))
    others = [
        dataclasses.replace(task, seed=task.seed + 1),
        dataclasses.replace(task, tensor=task.tensor + "_"),
        dataclasses.replace(task, models=tuple(place + 1 for place in task.places)),
    ]
    same = [bits_of(mill.merge(other)) == bits_of(mill.merge(task)) for other in others]
    assert same == [not subject.random] * 3, "whether another seed, tensor and place give the same bits"


def an_input_of_weight_zero_changes_no_bit(mill: Mill, subject: Subject, number: int) -> None:
    """So that it need not be read: not where others have zeros of either sign, nor where they cancel."""
    for given in subject.variants:
        values = [*values_for(subject, (2 * BLOCK + 5,), dtype=torch.bfloat16)]
        for value in values:
            value[::3] = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=value.dtype).repeat(BLOCK)[: len(value[::3])]
        task = subject.make_task(values, given)
        name = subject.method.unread_at_zero
        weights = task.settings[name]
        idle = dataclasses.replace(task, settings={**task.settings, name: _without(weights, number, 0.0)})
        absent = dataclasses.replace(
            task,
            inputs=_without(task.inputs, number + task.has_base),
            settings={key: _without(x, number) if _is_own(subject, key) else x for key, x in task.settings.items()},
            models=_without(task.places, number),
        )
        for out in ("F32", "BF16"):
            with_it, without = (mill.run(mill.express(each), out=out) for each in (idle, absent))
            assert bits_of(with_it) == bits_of(without), f"with {given}"


def _without(values: tuple[Any, ...], number: int, *instead: Any) -> tuple[Any, ...]:
    return (*values[:number], *instead, *values[number + 1 :])


def _is_own(subject: Subject, name: str) -> bool:
    return any(parameter.name == name and parameter.per_model for parameter in subject.method.parameters)


def _each_input(subject: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if subject.method.unread_at_zero and subject.models > max(1, subject.method.least_inputs):
        yield from ((f"input {i}", (i,)) for i in range(subject.models))


CHECKS: tuple[tuple[Check, Cases], ...] = (
    (inputs_are_not_changed, once),
    (the_same_task_gives_the_same_bits, once),
    (any_slab_gives_the_same_bits, each(torch.float32, torch.bfloat16)),
    (any_cut_into_parts_gives_the_same_bits, variants),
    (keeping_the_inputs_between_passes_gives_the_same_bits, once),
    (threads_of_torch_change_nothing, once),
    (seed_tensor_and_place_matter_to_random_methods_alone, once),
    (an_input_of_weight_zero_changes_no_bit, _each_input),
)
