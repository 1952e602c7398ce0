"""A merge gives the same bytes whatever modes its caller has set, and leaves them as they were."""

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import write_llama
from torch import Tensor

from mergemill.engine import make_plan, merge_state_dicts, merge_tensors, run, verify
from mergemill.engine.conformance.mill import Mill, Task, cut_pieces, fill_settings, make_values
from mergemill.engine.methods import find_methods, merge_method
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.values import OutputTensor, Part
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.runs.tasks.piece import gather_rest
from mergemill.engine.runs.tasks.task import merge_part
from mergemill.engine.runs.worker import modes, process
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors import native
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.slabs import BLOCK

Mode = Callable[[], AbstractContextManager[Any]]
FLUSHED = 5e-324  # the least float64: zero where denormals are flushed


@contextmanager
def given_back(put: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    """In the block `put(value)` holds; afterwards `put(before)`."""
    put(value)
    try:
        yield
    finally:
        put(before)


def rounding_up() -> AbstractContextManager[None]:
    library, to_nearest, up = ctypes.CDLL("libm.so.6"), 0, 0x800
    return given_back(library.fesetround, up, to_nearest)


MODES: dict[str, Mode] = {
    "denormals are flushed": lambda: given_back(torch.set_flush_denormal, True, False),
    "default device": lambda: given_back(torch.set_default_device, "meta", None),
    "device block": lambda: torch.device("meta"),
    "default dtype": lambda: given_back(torch.set_default_dtype, torch.float64, torch.float32),
    "numpy raises": lambda: np.errstate(all="raise"),
    "gradients": lambda: torch.set_grad_enabled(True),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "inference": lambda: torch.inference_mode(True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "rough products": lambda: given_back(torch.set_float32_matmul_precision, "medium", "highest"),
    "threads": lambda: given_back(torch.set_num_threads, 3, torch.get_num_threads()),
    "deterministic": lambda: given_back(torch.use_deterministic_algorithms, True, False),
}
if sys.platform == "linux" and native.load() is not None:  # the native loops alone can undo it
    MODES["rounding"] = rounding_up


def find_modes() -> list[Any]:
    """Return all that a merge might have changed."""
    return [
        float(np.float64(FLUSHED) * 2.0**60) == 0.0,
        (np.float32(1) / np.float32(3)).tobytes(),
        str(torch.get_default_device()),
        torch.get_default_dtype(),
        np.geterr(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    ]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the native loops, where they were built, and without."""
    if not request.param:
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("the native loops were not built: there is no C compiler")
    return bool(request.param)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, loops: bool) -> Mode:
    """One of the modes that a caller may have set."""
    if request.param == "rounding" and not loops:
        pytest.skip("only the native loops can undo it")
    return MODES[request.param]


def make_inputs(method: Method) -> list[Tensor]:
    """Return a base, where the method may take one, and models: some of their differences are denormal or infinite."""
    count = min(method.most_inputs or 3, 3)
    shape = (24, 90) if method.reads == "matrix" else (24, 3000)
    inputs = make_values(shape, count=count + (method.base in ("required", "optional")))
    for x in inputs:
        x[8:16] *= 1e-38
        if method.reads != "matrix":
            x[16, :5] = math.inf
            x[17, :5] *= 3e38
    return inputs


def make_settings(method: Method) -> dict[str, Any]:
    return {p.name: p.kind(1 if p.kind is int else 0.4) for p in method.parameters if p.required or p.name == "density"}


def merge_some(names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of each method's merge of the same tensors in memory."""
    found = {}
    for name in names:
        base, models = (None, INPUTS[name]) if METHODS[name].base == "none" else (INPUTS[name][0], INPUTS[name][1:])
        merged = merge_tensors(models, name, base=base, **make_settings(METHODS[name]))
        assert (merged.is_inference(), merged.requires_grad, merged.device.type) == (False, False, "cpu")
        found[name] = bytes_of(merged)
    return found


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().view(torch.uint8).numpy().tobytes()


METHODS = find_methods()
INPUTS = {name: make_inputs(method) for name, method in METHODS.items()}
SOME = ("ties", "karcher", "model_stock", "iso_c")


def test_merges_in_memory_give_the_same_bytes_and_all_modes_back(mode: Mode) -> None:
    expected = merge_some(SOME)
    with mode():
        before = find_modes()
        found = merge_some(SOME)
        assert find_modes() == before
    assert [name for name in expected if found[name] != expected[name]] == []


def test_every_method_gives_the_same_bytes_under_all_modes_at_once(loops: bool) -> None:
    expected = merge_some(METHODS)
    with ExitStack() as stack:
        for name, mode in MODES.items():
            if loops or name != "rounding":
                stack.enter_context(mode())
        before = find_modes()
        found = merge_some(METHODS)
        assert find_modes() == before
    assert [name for name in expected if found[name] != expected[name]] == []


CUT = ("ties", "slerp", "dare_ties", "linear", "model_stock")


def merge_cut(expression: Merged) -> bytes:
    """Return what tasks in this thread make of a tensor that is cut."""
    workplace = Workplace(1 << 28, 1)
    tensor = OutputTensor("x", "BF16", expression)
    pieces = cut_pieces(tensor, 2)
    assert len(pieces) == 2
    totals = gather_rest(pieces, [], workplace)
    written = bytearray(2 * expression.place.size)

    def sink(offset: int, data: memoryview) -> None:
        written[offset : offset + len(data)] = data

    for piece in pieces:
        part = Part(0, 0, piece.offset_bytes, piece.offset_bytes + 2 * piece.span.size, (piece,))
        merge_part(part, "shard", sink, {"x": totals} if totals else {}, workplace)
    return bytes(written)


def test_tasks_give_the_same_bytes_and_all_modes_back(mode: Mode, tmp_path: Path) -> None:
    mill, merges = Mill(tmp_path), {}
    for name in CUT:
        method = METHODS[name]
        inputs, models = tuple(INPUTS[name]), len(INPUTS[name]) - (method.base == "required")
        own = {p.name: p.per_model for p in method.parameters}
        given = {key: (value,) * models if own[key] else value for key, value in make_settings(method).items()}
        settings = fill_settings(method, given, models)
        merges[name] = mill.express(Task(name, inputs, settings))
    assert all(merged.place.size > BLOCK for merged in merges.values())
    expected = {name: merge_cut(merged) for name, merged in merges.items()}
    with mode():
        before = find_modes()
        found = {name: merge_cut(merged) for name, merged in merges.items()}
        assert find_modes() == before
    assert [name for name in CUT if found[name] != expected[name]] == []


def test_a_merge_of_files_and_its_replay_give_the_same_bytes(mode: Mode, tmp_path: Path) -> None:
    """Threads that are started take over how their starter computes. Plans are made with Python's own floats."""
    if mode is rounding_up:
        pytest.skip("what rounds otherwise plans otherwise: weights are other numbers")
    base = write_llama(tmp_path / "base", seed=0, layers=1)
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    for seed, name in enumerate("ab", 1):
        write_llama(tmp_path / name, seed=seed, near=base, layers=1)
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": models,
        "parameters": {"weight": 1e-38},
    }
    plan = make_plan(parse_recipe(str(recipe | {"dtype": "float32"})))
    run(plan, tmp_path / "out", workers=0, threads=1)
    with mode():
        run(plan, tmp_path / "again", workers=0, threads=1)
        assert verify(tmp_path / "out", replay=99).replayed == len(plan.parts)
    shards = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("*.safetensors")]
    assert shards
    for shard in shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "again" / shard).read_bytes()


class Fault(Exception):
    """A user's."""


@merge_method(reads="element")
def failing(models: Sequence[Tensor]) -> Tensor:
    """Fail, after looking at the modes."""
    seen.append(find_modes())
    raise Fault


seen: list[list[Any]] = []


def test_a_merge_that_fails_gives_all_modes_back(mode: Mode) -> None:
    seen.clear()
    fresh = find_modes()
    with mode():
        before = find_modes()
        with pytest.raises(Fault):
            merge_state_dicts([{"x": torch.ones(5, device="cpu")}] * 2, failing)
        assert find_modes() == before
    (inside,) = seen
    assert inside[0] is False
    assert inside[1:4] == fresh[1:4]
    assert set(inside[4].values()) == {"ignore"}
    assert inside[6:9] == [False, False, "highest"]


def test_where_denormals_were_flushed_torch_has_one_thread() -> None:
    """Its other threads may flush them as well."""
    with given_back(torch.set_num_threads, 3, torch.get_num_threads()):
        with modes.own_modes(one_thread=False):
            assert torch.get_num_threads() == 3
        with given_back(torch.set_flush_denormal, True, False), modes.own_modes(one_thread=False):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3


def test_of_two_merges_at_once_the_last_gives_back_and_what_was_set_meanwhile_stays() -> None:
    first, second = modes.own_modes(), modes.own_modes()
    with given_back(torch.set_default_dtype, torch.float64, torch.float32):
        with first:
            with second:
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
        with modes.own_modes():
            torch.set_default_dtype(torch.float16)
        assert torch.get_default_dtype() == torch.float16


def test_a_merge_in_the_callers_process_leaves_malloc_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(process, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed, layers=1)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    run(make_plan(parse_recipe(str(recipe | {"parameters": {"weight": 1}}))), tmp_path / "out", workers=0)
    assert calls == []
    process.keep_freed_pages()
    assert len(calls) == 2 * (sys.platform == "linux")


UNLOADED = """
import sys
from mergemill.engine.runs.worker.modes import own_modes
with own_modes():
    assert "torch" not in sys.modules
    from mergemill.engine.tensors.lazy import torch
    inside = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
print(*inside)
"""


def test_torch_that_is_loaded_in_a_task_is_set_from_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", UNLOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "torch.float32", "highest"]
