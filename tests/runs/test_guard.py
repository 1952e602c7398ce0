"""The guard over whole merges: what it finds and what it does not, and what each policy does about it."""

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import read_arrays, read_tensors, write_llama, write_tensors
from runs.merging import (
    SMALL_PART,
    finished_parts,
    hash_output,
    is_loadable,
    list_files,
    make_recipe_of,
    parts_of,
    run_until,
    write_family,
)
from torch import Tensor

from mergemill.engine import abort, make_plan, run, verify
from mergemill.engine.errors import RunError
from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import graph
from mergemill.engine.runs.events import Committed
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.tasks.guard import Report, make_report
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.slabs import BLOCK

Recipe = Mapping[str, Any]
Merge = Callable[..., Committed]

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
Q, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
SIZES: Mapping[str, Any] = {"layers": 1, "hidden": 32, "intermediate": 48, "vocab": 96}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with the small models ``base``, ``A`` and ``B`` in float32, to be changed by the test."""
    base = write_llama(tmp_path / "base", seed=0, dtype="float32", **SIZES)
    for seed, name in enumerate("AB", start=1):
        write_llama(tmp_path / name, seed=seed, near=base, dtype="float32", **SIZES)
    return tmp_path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose matrices have 2 blocks and embeddings 3.1, so that parts cut them. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("large"), vocab=800, layers=1)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Write a model anew with other tensors."""
    tensors = read_tensors(folder)
    edit(tensors)
    write_tensors(folder, tensors)


def tasks(folder: Path, *models: str, weight: Any = 1, **more: Any) -> Recipe:
    """Return the recipe of task arithmetic over models of a folder."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / model)} for model in models or ("A",)],
        "parameters": {"weight": weight},
        **more,
    }


def plan_of(recipe: Recipe, part_bytes: int = SMALL_PART) -> Plan:
    with parts_of(part_bytes):
        return make_plan(make_recipe_of(recipe))


def find_faults(report: Report) -> dict[str, str]:
    return {fault.tensor: fault.fault for fault in report.faults}


def list_names(folder: Path) -> list[str]:
    return sorted(read_tensors(folder))


def say_broken(count: int) -> str:
    return f"has {count:,} values that are not finite"


# ------------------------------------------------------------------------------------------------ not finite
def test_nan_and_infinities_of_an_input_are_found_and_counted(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(-1)[[0, 700, 1535]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        tensors[NORM][31] = torch.nan

    change(zoo / "B", edit)
    committed = merge_here(tasks(zoo, "A", "B"), tmp_path / "out")
    assert find_faults(committed.guard) == {DOWN: say_broken(3), NORM: say_broken(1)}
    assert [(fault.broken, fault.kept_base) for fault in committed.guard.faults] == [(3, False), (1, False)]
    assert [fault.change for fault in committed.guard.faults] == [None, None]
    out = read_tensors(tmp_path / "out")
    assert sum(int((~torch.isfinite(tensor)).sum()) for tensor in out.values()) == 4


def test_broken_values_are_counted_over_all_parts_also_outside_the_sample(large: Path, tmp_path: Path) -> None:
    shutil.copytree(large, tmp_path / "models")
    places = [5, BLOCK - 1, BLOCK + 2000, 2 * BLOCK - 1]

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(-1)[places] = torch.nan

    change(tmp_path / "models" / "A", edit)
    plan = plan_of(tasks(tmp_path / "models"))
    assert sum(piece.tensor.name == DOWN for part in plan.parts for piece in part.pieces) == 2
    committed = run(plan, tmp_path / "out", workers=0, threads=2)
    assert find_faults(committed.guard) == {DOWN: say_broken(4)}


def test_overflow_of_the_written_dtype_is_found_and_counted(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    for name in ("base", "A"):
        change(zoo / name, lambda tensors: tensors[DOWN].mul_(65504 / 0.4))
    committed = merge_here(tasks(zoo, out_dtype="float16"), tmp_path / "out")
    written = read_tensors(tmp_path / "out")[DOWN]
    count = int(torch.isinf(written).sum())
    assert written.dtype == torch.float16
    assert 0 < count < written.numel()
    assert find_faults(committed.guard) == {DOWN: say_broken(count)}
    assert not merge_here(tasks(zoo, out_dtype="bfloat16"), tmp_path / "wide").guard.faults


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_large_values_whose_sum_overflows_are_no_fault(
    dtype: str, zoo: Path, tmp_path: Path, merge_here: Merge
) -> None:
    most = torch.finfo(getattr(torch, dtype)).max

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(getattr(torch, dtype))
        tensors[DOWN].fill_(most)
        tensors[UP].fill_(-most)

    for name in ("base", "A"):
        change(zoo / name, edit)
    committed = merge_here(tasks(zoo), tmp_path / "out")
    assert committed.guard.faults == ()
    assert bool((read_tensors(tmp_path / "out")[DOWN] == most).all())


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_float8_is_watched_as_well(dtype: str, zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    for name in ("base", "A"):

        def edit(tensors: dict[str, Tensor]) -> None:
            tensors |= {key: tensor.to(TORCH_DTYPES[dtype]) for key, tensor in tensors.items()}

        change(zoo / name, edit)
    assert merge_here(tasks(zoo), tmp_path / "out").guard.faults == ()
    assert read_tensors(tmp_path / "out")[DOWN].dtype == TORCH_DTYPES[dtype]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(torch.uint8).view(-1)[[3, 77]] = 0x7F

    change(zoo / "A", spoil)
    assert find_faults(merge_here(tasks(zoo), tmp_path / "spoilt").guard) == {DOWN: say_broken(2)}


# ------------------------------------------------------------------------------------------------------ growth
@pytest.mark.parametrize(
    ("step", "times"),
    [
        ({"weight": 3.01}, 3.01),
        ({"weight": -3.01}, 3.01),
        ({"weight": 2.99}, None),
        ({"weight": 1, "coefficients": {"method": "lines", "alpha": 3.01, "beta": 0}}, 3.01),
        ({"weight": 1, "coefficients": {"method": "lines", "alpha": 2.99, "beta": 0}}, None),
    ],
)
def test_growth_is_found_above_the_ratio_only(
    step: dict[str, Any], times: float | None, zoo: Path, tmp_path: Path, merge_here: Merge
) -> None:
    committed = merge_here(tasks(zoo, guard={"growth": 3}, **step), tmp_path / "out")
    fault = f"changed {times} times as much as any of its inputs, more than 3 times"
    wanted = {} if times is None else dict.fromkeys(list_names(zoo / "base"), fault)
    assert find_faults(committed.guard) == wanted
    assert all(change.growth == pytest.approx(times or 2.99, rel=1e-3) for change in committed.guard.most_changed)


def test_growth_is_measured_by_the_task_vector_of_a_delta_base(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    """B may lie far from the base; what is added of it is little, and what is measured is that."""
    models = [{"model": str(zoo / "B"), "delta_base": str(zoo / "A")}]
    committed = merge_here(tasks(zoo, models=models, weight=2), tmp_path / "out")
    assert all(change.growth == pytest.approx(2, rel=1e-3) for change in committed.guard.most_changed)


def test_the_change_is_the_share_of_the_bases_norm(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    """Tensors of no more than 1,024 elements are seen whole; of larger ones the first 1,024 of a block."""
    committed = merge_here(tasks(zoo, "A", "B", weight=0.7), tmp_path / "out")
    base, out = read_arrays(zoo / "base"), read_arrays(tmp_path / "out")
    for each in committed.guard.most_changed:
        before, after = base[each.tensor].ravel()[:1024], out[each.tensor].ravel()[:1024]
        share = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert each.change == pytest.approx(share, rel=1e-5), each.tensor


def test_the_ten_most_changed_are_named_in_order(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    names = list_names(zoo / "base")
    assert len(names) == 12
    random.Random(0).shuffle(names)
    weight = [*({"filter": name, "value": 0.5 + i} for i, name in enumerate(names)), {"value": 1}]
    base = read_tensors(zoo / "base")
    write_tensors(zoo / "A", {name: tensor * 1.001 for name, tensor in base.items()})  # all as far from the base
    committed = merge_here(tasks(zoo, weight=weight, guard={"growth": 1000}), tmp_path / "out")
    assert [each.tensor for each in committed.guard.most_changed] == names[::-1][:10]
    assert committed.guard.faults == ()


def test_faults_are_named_the_most_changed_first_and_may_be_more_than_ten(
    zoo: Path, tmp_path: Path, merge_here: Merge
) -> None:
    change(zoo / "A", lambda tensors: tensors[UP].fill_(torch.nan))
    committed = merge_here(tasks(zoo, weight=20), tmp_path / "out")
    assert len(committed.guard.faults) == 12
    assert len(committed.guard.most_changed) == 10
    assert committed.guard.faults[0].tensor == UP
    changes = [fault.change for fault in committed.guard.faults[1:]]
    assert changes == sorted(changes, key=lambda change: -(change or 0))


# ------------------------------------------------------------------------------------------------ false alarms
def make_plain_recipe(method: str, models: Sequence[Path]) -> Recipe:
    """Return a recipe of any method with as few settings as it needs; the first model is the base where it has one."""
    found = find_methods()[method]
    count = min(len(models) - 1, found.most_inputs or len(models))
    listed = (
        models[: found.most_inputs or len(models)] if found.base in ("none", "first of two") else models[1:][:count]
    )
    return {
        "merge_method": method,
        **({} if found.base == "none" else {"base_model": str(models[0])}),
        "models": [{"model": str(model)} for model in listed],
        "parameters": {parameter.name: 0.5 for parameter in found.parameters if parameter.required},
    }


@pytest.mark.parametrize("method", find_methods())
def test_identical_models_raise_nothing(method: str, zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    models = [tmp_path / name for name in ("same-0", "same-1", "same-2")]
    for model in models:
        shutil.copytree(zoo / "base", model)
    committed = merge_here(make_plain_recipe(method, models), tmp_path / "out")
    assert committed.guard.faults == ()
    assert all((each.change or 0) < 1e-5 for each in committed.guard.most_changed)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "karcher", "multislerp", "tsv"])
def test_models_that_differ_in_last_bits_raise_nothing(
    method: str, zoo: Path, tmp_path: Path, merge_here: Merge
) -> None:
    models = [tmp_path / name for name in ("same-0", "same-1", "same-2")]
    for i, model in enumerate(models):
        shutil.copytree(zoo / "base", model)

        def nudge(tensors: dict[str, Tensor], i: int = i) -> None:
            for tensor in tensors.values():
                tensor.view(-1)[i :: 7 * i + 1].mul_(1 + 2e-7)

        change(model, nudge)
    committed = merge_here(make_plain_recipe(method, models), tmp_path / "out")
    assert committed.guard.faults == ()


def test_copied_tensors_are_not_watched(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(zoo / "A")}]}
    assert merge_here(recipe, tmp_path / "out").guard == Report((), ())


def test_parts_of_copied_and_merged_tensors_keep_their_findings_apart(
    zoo: Path, tmp_path: Path, merge_here: Merge
) -> None:
    scale = [{"filter": "q_proj", "value": 3}, {"filter": "norm", "value": 0.5}]
    recipe = {"merge_method": "passthrough", "models": [{"model": str(zoo / "A")}], "parameters": {"scale": scale}}
    report = merge_here(recipe, tmp_path / "out").guard
    norms = [NORM, *(f"model.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))]
    assert [each.tensor for each in report.most_changed] == [Q, *sorted(norms)]
    assert [each.change for each in report.most_changed] == pytest.approx([2.0, 0.5, 0.5, 0.5])
    assert {each.growth for each in report.most_changed} == {0.0}
    assert report.faults == ()


@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp"])
def test_one_model_alone_raises_nothing(method: str, zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    settings = {"weight": 1} if method != "karcher" else {}
    recipe = {"merge_method": method, "models": [{"model": str(zoo / "A")}], "parameters": settings}
    report = merge_here(recipe, tmp_path / "out").guard
    assert report.faults == ()
    assert len(report.most_changed) == 10


def test_a_base_of_zeros_raises_nothing(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    change(zoo / "base", lambda tensors: tensors[NORM].zero_())
    report = merge_here(tasks(zoo), tmp_path / "out").guard
    assert report.faults == ()
    assert (report.most_changed[0].tensor, report.most_changed[0].change) == (NORM, None)


@pytest.mark.parametrize("policy", ["warn", "keep-base", "fail"])
def test_scalars_buffers_and_empty_tensors_are_no_obstacle(policy: str, tmp_path: Path, merge_here: Merge) -> None:
    extras = ("integer", "bool", "scalar", "empty")
    base = write_llama(tmp_path / "base", seed=0, extras=extras, **SIZES)
    write_llama(tmp_path / "A", seed=1, near=base, extras=extras, **SIZES)
    change(tmp_path / "A", lambda tensors: tensors["model.logit_scale"].fill_(0.75))
    committed = merge_here(tasks(tmp_path, guard={"policy": policy}), tmp_path / "out")
    (scale,) = [each for each in committed.guard.most_changed if each.tensor == "model.logit_scale"]
    assert (scale.change, scale.growth, committed.guard.faults) == (0.5, 1.0, ())
    assert verify(tmp_path / "out", replay=1).replayed == 1


# --------------------------------------------------------------------------------------------------- keep-base
WEIGHT = [{"filter": "mlp.up", "value": 40}, {"filter": "embed", "value": 30}, {"value": 0.6}]
KEPT = {UP, EMBEDDING}
GUARD = {"policy": "keep-base"}
KEEPING: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.5, "normalize": False},
    "della": {"density": 0.5, "normalize": False},
    "dare_ties": {"density": 0.5, "normalize": False, "rescale": False},
}


def make_kept_recipe(method: str, folder: Path, **more: Any) -> Recipe:
    recipe = tasks(folder, "A", "B", guard=GUARD, **more)
    return {**recipe, "merge_method": method, "parameters": {"weight": WEIGHT, **KEEPING[method]}}


@pytest.mark.parametrize(
    ("method", "part_bytes"), [*((method, SMALL_PART) for method in KEEPING), ("ties", 1 << 30), ("della", 1 << 30)]
)
def test_keep_base_writes_the_base_for_flagged_tensors_only(
    method: str, part_bytes: int, large: Path, tmp_path: Path
) -> None:
    recipe = make_kept_recipe(method, large)
    plan = plan_of(recipe, part_bytes)
    if part_bytes == SMALL_PART:
        cut = {piece.tensor.name for part in plan.parts for piece in part.pieces if not piece.whole}
        assert {DOWN, *KEPT} <= cut
    committed = run(plan, tmp_path / "kept", workers=0, threads=2)
    run(plan_of({**recipe, "guard": {"policy": "warn"}}), tmp_path / "warned", workers=0)
    assert {fault.tensor for fault in committed.guard.faults} == KEPT
    assert all(fault.kept_base and (fault.growth or 0) > 10 for fault in committed.guard.faults)
    assert not any(each.kept_base for each in committed.guard.most_changed if each.tensor not in KEPT)
    kept, warned, base = (read_tensors(path) for path in (tmp_path / "kept", tmp_path / "warned", large / "base"))
    for name, tensor in kept.items():
        assert torch.equal(tensor, base[name] if name in KEPT else warned[name]), name
        assert not torch.equal(tensor, warned[name] if name in KEPT else base[name]), name


def test_keep_base_gives_the_same_report_for_any_parts(large: Path, tmp_path: Path) -> None:
    recipe = make_kept_recipe("ties", large)
    reports = [
        run(plan_of(recipe, size), tmp_path / str(size), workers=0, threads=threads, slab=slab).guard
        for size, threads, slab in ((SMALL_PART, 4, BLOCK), (3 * SMALL_PART, 1, 4 * BLOCK), (1 << 30, 1, BLOCK))
    ]
    assert reports[0] == reports[1] == reports[2]


def test_a_warning_gives_nearly_the_same_numbers_for_any_parts(large: Path, tmp_path: Path) -> None:
    """The sums of the parts are rounded before they are added up."""
    recipe = {**make_kept_recipe("ties", large), "guard": {"policy": "warn"}}
    cut, whole = (run(plan_of(recipe, size), tmp_path / str(size), workers=0).guard for size in (SMALL_PART, 1 << 30))
    assert find_faults(cut) == find_faults(whole)
    assert [each.tensor for each in cut.most_changed] == [each.tensor for each in whole.most_changed]
    for left, right in zip(cut.most_changed, whole.most_changed, strict=True):
        assert (left.change, left.growth) == pytest.approx((right.change, right.growth), rel=1e-12)


def test_broken_tensors_keep_the_base_in_the_written_dtype(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    change(zoo / "A", lambda tensors: tensors[DOWN].view(-1)[7:9].fill_(torch.nan))
    committed = merge_here(tasks(zoo, guard=GUARD, out_dtype="float16"), tmp_path / "out")
    assert find_faults(committed.guard) == {DOWN: say_broken(2)}
    assert committed.guard.faults[0].kept_base
    out, base, a = (read_tensors(path) for path in (tmp_path / "out", zoo / "base", zoo / "A"))
    assert torch.equal(out[DOWN], base[DOWN].half())
    assert torch.allclose(out[UP].float(), a[UP], rtol=1e-3, atol=1e-6)


def test_slerp_keeps_its_base(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    change(zoo / "A", lambda tensors: tensors[DOWN].view(-1)[7].fill_(torch.nan))
    recipe = {
        "merge_method": "slerp",
        "base_model": str(zoo / "base"),
        "models": [{"model": str(zoo / "A")}, {"model": str(zoo / "base")}],
        "parameters": {"t": 0.5},
        "guard": GUARD,
    }
    committed = merge_here(recipe, tmp_path / "out")
    assert [fault.tensor for fault in committed.guard.faults] == [DOWN]
    assert torch.equal(read_tensors(tmp_path / "out")[DOWN], read_tensors(zoo / "base")[DOWN])


def test_a_base_is_kept_in_the_memory_that_was_promised(tmp_path: Path) -> None:
    """Where slabs hold whole rows, the base's own must be the same, or what was kept of it does not serve again."""
    folder = write_llama(tmp_path / "base", seed=0, **{**SIZES, "hidden": 300, "heads": 6, "kv_heads": 6}, tied=True)
    write_llama(tmp_path / "A", seed=1, near=folder, **{**SIZES, "hidden": 300, "heads": 6, "kv_heads": 6}, tied=True)
    for seed, name in enumerate(("base", "A")):

        def enlarge(tensors: dict[str, Tensor], seed: int = seed) -> None:
            tensors[EMBEDDING] = torch.randn(30_000, 300, generator=torch.Generator().manual_seed(seed)).bfloat16()

        change(tmp_path / name, enlarge)
    recipe = {
        **tasks(tmp_path, guard={"policy": "keep-base", "growth": 2}),
        "merge_method": "della",
        "parameters": {"weight": 5, "density": 0.8, "normalize": False},
    }
    committed = run(plan_of(recipe, 1 << 30), tmp_path / "out", workers=0, threads=1)
    assert EMBEDDING in find_faults(committed.guard)
    out, base = read_tensors(tmp_path / "out"), read_tensors(folder)
    assert torch.equal(out[EMBEDDING], base[EMBEDDING])
    verify(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- fail
def break_down(folder: Path) -> None:
    """Put NaN into one tensor of A, and infinities into another."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(-1)[3] = torch.nan
        tensors[Q].view(-1)[:5] = torch.inf

    change(folder / "A", edit)


def test_fail_commits_nothing_and_fails_again_without_work(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(large, tmp_path / "models")
    break_down(tmp_path / "models")
    plan, out = plan_of(tasks(tmp_path / "models", guard={"policy": "fail"})), tmp_path / "out"
    words = (
        f"{out}: {DOWN} has 1 values that are not finite (and 1 more tensors); the guard's policy is 'fail', so "
        f"nothing was committed. Change the recipe and merge into another folder, or mergemill abort {out}"
    )
    with pytest.raises(RunError, match=f"^{re.escape(words)}$"):
        run(plan, out, workers=0)
    assert not is_loadable(out)
    assert [path.name for path in out.iterdir()] == [".mergemill"]
    assert len(finished_parts(out)) == len(plan.parts)

    def refuse(*_: object) -> None:
        raise AssertionError("a part is merged again")

    monkeypatch.setattr(graph, "run_part", refuse)
    before = list_files(out)
    with pytest.raises(RunError, match=f"^{re.escape(words)}$"):
        run(plan, out, workers=0)
    driver = ".mergemill/driver.json"  # says who drove the last run
    assert {**list_files(out), driver: before[driver]} == before
    assert abort(out) > plan.write_bytes // 2
    assert not out.exists()


def test_fail_without_a_fault_commits(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    committed = merge_here(tasks(zoo, weight=1.5, guard={"policy": "fail", "growth": 2}), tmp_path / "out")
    assert committed.guard.faults == ()
    assert is_loadable(tmp_path / "out")
    with pytest.raises(RunError, match=r"changed 2.5 times as much as any of its inputs, more than 2 times \(and 11"):
        merge_here(tasks(zoo, weight=2.5, guard={"policy": "fail", "growth": 2}), tmp_path / "other")


# ------------------------------------------------------------------------------------- receipts and the journal
@pytest.mark.parametrize("policy", ["warn", "keep-base"])
def test_a_resume_keeps_what_was_found_before(policy: str, large: Path, tmp_path: Path) -> None:
    shutil.copytree(large, tmp_path / "models")
    break_down(tmp_path / "models")
    recipe = {**make_kept_recipe("task_arithmetic", tmp_path / "models"), "guard": {"policy": policy}}
    plan = plan_of(recipe)
    whole = run(plan, tmp_path / "whole", workers=0)
    assert set(find_faults(whole.guard)) == {*KEPT, DOWN, Q}
    for parts in (1, len(plan.parts) // 2):
        out = tmp_path / f"out-{parts}"
        run_until(plan, out, parts)
        committed = run(plan, out, workers=0)
        assert committed.redone_parts == len(plan.parts) - parts
        assert committed.guard == whole.guard
        assert hash_output(out) == hash_output(tmp_path / "whole")
    assert run(plan, tmp_path / "whole", workers=0).guard == whole.guard, "a finished merge says it again"


@pytest.mark.parametrize("policy", ["warn", "keep-base"])
def test_parts_may_end_in_any_order(policy: str, large: Path, tmp_path: Path) -> None:
    plan = plan_of({**make_kept_recipe("ties", large), "guard": {"policy": policy}})
    committed = run(plan, tmp_path / "out", workers=0)
    receipts = list(FolderOutput(tmp_path / "out").journal.read())
    for seed in range(5):
        random.Random(seed).shuffle(receipts)
        assert make_report(plan, receipts) == committed.guard
    assert make_report(plan, sorted(receipts, key=lambda receipt: -receipt.part)) == committed.guard


def test_the_journal_is_json_that_any_reader_takes(zoo: Path, tmp_path: Path, merge_here: Merge) -> None:
    break_down(zoo)
    merge_here(tasks(zoo), tmp_path / "out")

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    for line in (tmp_path / "out" / ".mergemill" / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("policy", ["keep-base", "fail"])
def test_a_journal_of_a_version_without_a_guard_is_taken_as_it_is(policy: str, large: Path, tmp_path: Path) -> None:
    plan = plan_of(tasks(large, guard={"policy": policy}))
    for parts, out in ((len(plan.parts) // 2, tmp_path / "half"), (len(plan.parts), tmp_path / "all")):
        run_until(plan, out, parts)
        journal = out / ".mergemill" / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        assert all(line.pop("drifts") for line in lines)
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        committed = run(plan, out, workers=0)
        assert committed.redone_parts == len(plan.parts) - parts
        assert committed.guard.faults == ()
        assert bool(committed.guard.most_changed) == bool(committed.redone_parts)
        assert verify(out).parts == len(plan.parts)


def cast_of(folder: Path, value: float, **more: Any) -> Recipe:
    """Return the recipe of a copy as float16 of a model that holds `value`."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][1, 1] = value
        tensors[DOWN][-1, -1] = -value

    change(folder / "A", edit)
    return {"merge_method": "passthrough", "models": [{"model": str(folder / "A")}], "dtype": "float16", **more}


@pytest.mark.parametrize("part_bytes", [SMALL_PART, 1 << 20])
def test_a_cast_that_makes_infinities_is_told_with_the_tensor(zoo: Path, part_bytes: int) -> None:
    report = merge_report(cast_of(zoo, 1e5), zoo / "out", part_bytes)
    assert [(fault.tensor, fault.broken, fault.fault) for fault in report.faults] == [
        (DOWN, 2, "has 2 values that are not finite, cast from F32 to F16")
    ]
    assert report.most_changed == ()  # nothing was merged


def test_a_cast_within_the_range_is_no_fault(zoo: Path) -> None:
    assert merge_report(cast_of(zoo, 6e4), zoo / "out", SMALL_PART) == Report((), ())


def test_a_slice_that_is_scaled_is_watched_as_one_that_is_cast(zoo: Path) -> None:
    recipe = cast_of(zoo, 6e4, parameters={"scale": [{"filter": "mlp", "value": 2}, {"value": 1}]})
    (fault,) = merge_report(recipe, zoo / "out", SMALL_PART).faults
    assert (fault.tensor, fault.broken) == (DOWN, 2)


def test_a_cast_that_makes_infinities_is_not_committed_where_the_policy_is_to_fail(zoo: Path) -> None:
    with pytest.raises(RunError, match=rf"{re.escape(DOWN)} has 2 values that are not finite, cast from F32 to F16"):
        merge_report(cast_of(zoo, 1e5, guard={"policy": "fail"}), zoo / "out", SMALL_PART)
    assert not is_loadable(zoo / "out")


def merge_report(recipe: Recipe, out: Path, part_bytes: int) -> Report:
    """Merge and return what the guard saw."""
    found: list[Report] = []
    run(
        plan_of(recipe, part_bytes),
        out,
        workers=0,
        on_event=lambda event: found.append(event.guard) if isinstance(event, Committed) else None,
    )
    (report,) = found
    return report
