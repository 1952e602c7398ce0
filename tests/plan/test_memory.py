"""Projected memory: what a task will take is known from the plan, and too small a promise is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import Sketch, config, llama, plan_of, write_sketch

from mergemill.engine import describe_plan
from mergemill.engine.errors import InputError, PlanError
from mergemill.engine.plan.memory import stream_bytes, task_bytes
from mergemill.engine.plan.values import Plan
from mergemill.engine.tensors.slabs import SLAB

MIB = 1 << 20
BIG = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_big(method: str, elements: int, *, dtype: str = "BF16", models: int = 2) -> Plan:
    """Plan a merge of models with one big tensor and some small ones."""
    tensors: Sketch = {**llama(layers=1), BIG: (dtype, (elements // 64, 64))}
    names = [f"m{i}" for i in range(models)]
    for name in names:
        write_sketch(Path(name), tensors, config=config(layers=1))
    settings: dict[str, Any] = {"slerp": {"t": 0.5}, "passthrough": {}}.get(method, {"weight": 1, "density": 0.5})
    base = {} if method in ("linear", "passthrough") else {"base_model": "m0"}
    listed = [{"model": name} for name in (names[:1] if method == "passthrough" else names)]
    return plan_of({"merge_method": method, "models": listed, "parameters": settings, **base})


METHODS = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough"]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_task_takes_does_not_grow_with_the_tensor(method: str) -> None:
    small, large = (describe_plan(plan_big(method, size), memory="64MiB") for size in (32 * MIB, 1024 * MIB))
    assert large["write_bytes"] > 2 << 30
    assert large["projected_bytes"] <= 64 * MIB
    assert large["projected_bytes"] == small["projected_bytes"]


def test_a_slab_takes_its_inputs_as_stored_and_as_float32_and_the_output() -> None:
    plan = plan_big("linear", 32 * MIB)
    at_least = SLAB * (2 * 2 + 2 * 4 + 2)  # two inputs bf16, two float32, one written bf16
    assert at_least <= max(stream_bytes(part) for part in plan.parts) <= at_least + SLAB * 8 * 6


def test_more_models_and_wider_dtypes_take_more() -> None:
    two, five = (max(map(stream_bytes, plan_big("linear", 8 * MIB, models=count).parts)) for count in (2, 5))
    assert five - two >= 3 * SLAB * (2 + 4)
    wide = max(map(stream_bytes, plan_big("linear", 8 * MIB, dtype="F64").parts))
    assert wide - two >= 2 * SLAB * (6 + 4)


def test_inputs_that_are_read_twice_are_kept_where_the_promise_allows() -> None:
    plan = plan_big("slerp", MIB)  # 2 MiB bf16 a model: one part
    (part,) = plan.parts
    assert task_bytes(part, 1 << 30) >= stream_bytes(part) + 2 * 2 * MIB
    assert task_bytes(part, stream_bytes(part)) == stream_bytes(part)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [16 * MIB, 64 * MIB, 1 << 30])
def test_no_task_takes_more_than_is_promised(method: str, memory: int) -> None:
    plan = plan_big(method, 8 * MIB)
    try:
        found = describe_plan(plan, memory=memory)
    except PlanError:
        assert max(map(stream_bytes, plan.parts)) > memory
    else:
        assert found["projected_bytes"] <= memory


def test_too_small_a_promise_is_refused_with_the_tensor_and_the_number_that_would_do() -> None:
    plan = plan_big("ties", 8 * MIB)
    with pytest.raises(PlanError) as caught:
        describe_plan(plan, memory="2MiB")
    words = str(caught.value)
    assert words.startswith("--memory 2.0 MiB is too little: tensor model.embed_tokens.weight needs ")
    needed = re.search(r"needs (\d+) bytes", words)
    assert needed
    enough = int(needed[1])
    assert describe_plan(plan, memory=enough)["projected_bytes"] <= enough
    assert describe_plan(plan, memory=words.rpartition(" --memory ")[2])  # as it can be copied
    with pytest.raises(PlanError):
        describe_plan(plan, memory=enough - 1)


@pytest.mark.parametrize("memory", ["0", "-5", "much", "1 parsec"])
def test_a_memory_that_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(InputError, match=f"--memory: '{memory}' is not a size"):
        describe_plan(plan_big("linear", MIB), memory=memory)
