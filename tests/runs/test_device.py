"""Merging on a device, one that is simulated: the same bytes as the CPU, within a promise of memory."""

import gc
import json
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock, patch

import pytest
import torch
from distributed import Client, LocalCluster
from methods.harness import Mill, bits_of, make_values
from methods.suite import ENTRIES, make_task
from runs.merging import hash_output
from simulated import SimulatedPlace, There, whole_matrices_too

from mergemill.engine import describe_plan, make_plan, run
from mergemill.engine.errors import MergemillError, PlanError, RecipeError, RunError
from mergemill.engine.methods import find_methods
from mergemill.engine.plan.memory import DEVICE_FACTORS, find_staging, make_piece
from mergemill.engine.plan.values import OutputTensor, Plan
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.recipe.clusters import parse_cluster
from mergemill.engine.runs import threads
from mergemill.engine.runs.clusters.cluster import give_each_a_device
from mergemill.engine.runs.clusters.preflight import CONTEXT_BYTES, make_limit
from mergemill.engine.runs.worker import accelerator, workers
from mergemill.engine.runs.worker.accelerator import Accelerator, open_device, pin_memory
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.dtypes import NAMES
from mergemill.engine.tensors.exact import sum_blocks
from mergemill.engine.tensors.merged import Merging
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span
from mergemill.engine.tensors.workspace import Workspace

METHODS = tuple(name for name, method in find_methods().items() if method.reads != "matrix")
MATRIX_METHODS = tuple(name for name, method in find_methods().items() if method.reads == "matrix")
SMALL, LARGE = (37, 29), (2 * BLOCK + 4099,)  # of three blocks
MANY = (9 * BLOCK + 4099,)  # of ten
KINDS: tuple[tuple[torch.dtype, tuple[int, ...], str | None], ...] = (
    (torch.float32, LARGE, "F16"),
    (torch.bfloat16, SMALL, "BF16"),
    (torch.float8_e4m3fn, (70, 99), None),
    (torch.float64, (33, 20), "F64"),
    (torch.float64, (33, 20), "BF16"),
    (torch.float64, (33, 20), "F16"),
    (torch.float32, (0, 5), "F32"),
    (torch.float16, (), "F32"),
)
PROMISE = 1 << 30


def workers_place(device: SimulatedPlace) -> Workplace:
    return Workplace(PROMISE, 1, device=device)


def mills(folder: Path) -> tuple[Mill, Mill]:
    """Return one that merges on the CPU and one that merges on a device."""
    here, there = Mill(folder), Mill(folder)
    for workplace in (there._keeping, there._streaming):
        workplace.device = SimulatedPlace(PROMISE, 1)
    return here, there


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_device_gives_the_bytes_of_the_cpu_by_exact_operations_alone(name: str, tmp_path: Path) -> None:
    here, there = mills(tmp_path)
    for kind, shape, out in KINDS:
        for variant in ENTRIES[name].variants if shape == SMALL else (None,):
            task = make_task(name, make_values(shape, dtype=kind), variant)
            expected = bits_of(here.merge(task, out=out))
            assert bits_of(there.merge(task, out=out, slab=BLOCK)) == expected, (kind, shape, out, variant)
        if shape == LARGE:
            cut = there.merge(task, out=out, slab=BLOCK, parts=2, keep=False)
            assert bits_of(cut) == expected


def test_lanes_are_used_again_and_again(tmp_path: Path) -> None:
    here, there = mills(tmp_path)
    task = make_task("ties", make_values(MANY))
    assert bits_of(there.merge(task, out="BF16", slab=BLOCK, keep=False)) == bits_of(here.merge(task, out="BF16"))
    assert there._streaming.device is not None
    assert there._streaming.device.peak_bytes < 16 << 20  # 56 MiB would be all blocks at once


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_matrix_methods_run_on_a_device_within_the_stated_error(name: str, tmp_path: Path) -> None:
    here, there = mills(tmp_path)
    with whole_matrices_too():
        for shape in ((40, 24), (24, 40), (7,)):
            task = make_task(name, make_values(shape))
            torch.testing.assert_close(there.merge(task), here.merge(task), rtol=1e-5, atol=1e-6)


def test_the_simulated_device_refuses_what_a_gpu_does_differently() -> None:
    x = There(torch.ones(4))
    for wrong in (
        lambda: x.div_(3.0),  # multiplies by the reciprocal
        lambda: x.add_(x, alpha=2),  # is fused
        lambda: x.sum(),
        lambda: x.exp_(),
        lambda: x.add_(torch.ones(4)),  # lies on the host
        lambda: x.sort(),
    ):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(RuntimeError):
        x.numpy()


@pytest.mark.parametrize("block", [BLOCK, 1000, 3 * BLOCK // 2])
def test_sums_on_a_device_are_added_in_the_same_order(block: int) -> None:
    values = torch.rand(3 * BLOCK + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert sum_blocks(There(values.clone()), block) == sum_blocks(values, block)


class Here:
    """A machine with simulated devices."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.places: list[SimulatedPlace] = []

    def open(self, kind: str, memory_bytes: int, threads: int) -> SimulatedPlace | None:
        if kind == "cpu":
            return None
        self.places.append(SimulatedPlace(memory_bytes, threads, kind))
        return self.places[-1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Here:
    there = Here()
    for module in (accelerator, workers):
        monkeypatch.setattr(module, "count_devices", lambda kind: there.count if kind == "cuda" else 0)
    monkeypatch.setattr(threads, "open_device", there.open)
    return there


def plan_merge(family: Path, method: str = "ties", **more: Any) -> Plan:
    parameters = {"weight": 0.6, "density": 0.5} if method == "ties" else {}
    models = [{"model": str(family / name)} for name in ("A", "B")]
    value = {"merge_method": method, "base_model": str(family / "base"), "models": models, "parameters": parameters}
    return make_plan(parse_recipe(json.dumps(value | more)))


@pytest.mark.parametrize("policy", ["warn", "keep-base"])
def test_a_merge_on_a_device_writes_the_same_files_within_its_promise(
    policy: str, family: Path, tmp_path: Path, machine: Here
) -> None:
    plan = plan_merge(family, guard={"policy": policy, "growth": 0.3})
    here = run(plan, tmp_path / "cpu", workers=0, threads=2)
    there = run(plan, tmp_path / "cuda", threads=2, device="cuda", device_memory="64MiB")
    assert hash_output(tmp_path / "cuda") == hash_output(tmp_path / "cpu")
    assert here.guard == there.guard
    (place,) = machine.places
    assert 0 < place.peak_bytes <= place.memory_bytes == 64 << 20
    assert place.pinned_bytes > 0


def test_too_little_device_memory_is_refused_with_the_number_that_would_do(
    family: Path, tmp_path: Path, machine: Here
) -> None:
    plan = plan_merge(family)
    with pytest.raises(
        PlanError, match=r"--device-memory 1\.0 KiB is too little: tensor \S+ needs (\d+) bytes"
    ) as error:
        run(plan, tmp_path / "out", device="cuda", device_memory="1KiB")
    assert not (tmp_path / "out").exists()
    needed = int(str(error.value).partition("needs ")[2].split()[0])
    assert describe_plan(plan, device="cuda", device_memory=needed)["device_bytes"] == needed
    run(plan, tmp_path / "out", device="cuda", device_memory=needed)
    with pytest.raises(PlanError, match="is too little"):
        describe_plan(plan, device="cuda", device_memory=needed - 1)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there_is_one_error_before_anything_is_written(
    device: str, family: Path, tmp_path: Path
) -> None:
    if accelerator.count_devices(device):
        pytest.skip(f"there is a {device} device")
    with pytest.raises(PlanError, match=f"--device {device}: torch finds no such device here"):
        run(plan_merge(family), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MergemillError, match="torch finds no such device here"):
        open_device(device, 1 << 30, 1)


def test_auto_takes_a_device_for_methods_on_matrices(family: Path, machine: Here) -> None:
    assert describe_plan(plan_merge(family), device="auto")["device"] == "cpu"
    numbers = describe_plan(plan_merge(family, "tsv"), device="auto")
    assert numbers["device"] == "cuda"
    assert numbers["device_tensors"] > 0
    machine.count = 0
    assert describe_plan(plan_merge(family, "tsv"), device="auto")["device"] == "cpu"
    with pytest.raises(PlanError, match="the workers are elsewhere; say cuda or cpu"):
        describe_plan(plan_merge(family), device="auto", scheduler="tcp://127.0.0.1:1")
    with pytest.raises(PlanError, match="--device gpu: must be cpu, auto, cuda, xpu, mps"):
        describe_plan(plan_merge(family), device="gpu")


def test_each_gpu_has_a_worker_process_and_one_gpu_this_process(family: Path, machine: Here) -> None:
    plan = plan_merge(family)
    assert describe_plan(plan, device="cuda")["processes"] == 0
    machine.count = 3
    assert describe_plan(plan, device="cuda")["processes"] == 3
    assert describe_plan(plan, device="cuda", workers=2)["processes"] == 2
    with pytest.raises(PlanError, match="--workers 4: a worker has a cuda device of its own, and here are 3"):
        describe_plan(plan, device="cuda", workers=4)


def test_each_worker_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as started,
        Client(started, set_as_default=False) as client,
    ):
        give_each_a_device(started, "cuda", 2)
        client.wait_for_workers(2, timeout=60)
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["3", "5"]


def test_a_cluster_file_says_the_device_and_the_command_line_is_stronger(family: Path, machine: Here) -> None:
    plan, file = plan_merge(family), parse_cluster("{kind: local, workers: 1, device: cuda}")
    assert describe_plan(plan, cluster=file)["device"] == "cuda"
    assert describe_plan(plan, cluster=file, device="cpu")["device"] == "cpu"
    with pytest.raises(RecipeError, match="must be a kind of device, not the text 'cudda'; did you mean 'cuda'"):
        parse_cluster("{kind: local, workers: 1, device: cudda}")


def test_devices_without_float64_merge_by_element_in_float32(family: Path) -> None:
    element, ranked = plan_merge(family, "magmax"), plan_merge(family)
    for plan, narrow in ((element, True), (ranked, False)):
        piece = next(piece for part in plan.parts for piece in part.pieces if piece.tensor.dtype == "BF16")
        assert bool(find_staging(piece, "mps", SLAB, 1 << 40, 1 << 40)) is narrow
        staging = find_staging(piece, "cuda", SLAB, 1 << 40, 1 << 40)
        assert staging is not None
        assert staging.slab == DEVICE_FACTORS[0] * SLAB


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_outputs_stay_on_the_cpu(dtype: str, tmp_path: Path) -> None:
    values = make_values((8, 8), dtype=getattr(torch, dtype))
    expression = Mill(tmp_path).express(make_task("linear", values))
    staged = [
        find_staging(
            make_piece(OutputTensor("x", out, expression), Span(0, 64), 0, whole=True), "cuda", SLAB, 1 << 40, 1 << 40
        )
        for out in (NAMES[values[0].dtype], "BF16")
    ]
    assert staged[0] is None
    assert staged[1] is not None


class Streamed:
    """What torch has of a device's streams: it writes down who waits for whom."""

    def __init__(self) -> None:
        self.waits: list[tuple[object, object]] = []
        self.current = object()

    def Stream(self, device: str) -> Any:
        made = MagicMock()
        made.wait_stream.side_effect = lambda other: self.waits.append((made, other))
        return made

    def current_stream(self, device: str) -> object:
        return self.current

    def stream(self, stream: Any) -> Any:
        return nullcontext(stream)


def test_copies_and_work_wait_for_what_made_the_memory_and_a_thread_has_one_set_of_streams() -> None:
    module = Streamed()
    place = Accelerator("cuda", PROMISE, 2)
    with patch.object(torch, "get_device_module", lambda device: module):
        streams = place.streams()
        assert place.streams() is streams
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(place.streams).result() is not streams
        with streams.working() as work:
            assert {id(stream) for stream, other in module.waits if other is module.current} >= {id(work)}
            assert len(module.waits) == 2
            streams.put(torch.empty(2), torch.ones(2))
        assert module.waits[-1] == (work, module.waits[0][0])


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> Iterator[MagicMock]:
    """torch as where it finds a CUDA device of 80 GiB."""
    fake = MagicMock()
    fake.cuda.device_count.return_value = 1
    fake.empty.side_effect = lambda size_bytes, **_: torch.zeros(size_bytes, dtype=torch.uint8)
    fake.cuda.get_device_properties.return_value.total_memory = 80 << 30
    monkeypatch.setattr(accelerator, "torch", fake)
    accelerator._load_linalg.cache_clear()
    yield fake
    accelerator._load_linalg.cache_clear()


def test_decompositions_are_loaded_once_before_threads_can_need_them(torchs: MagicMock) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: open_device("cuda", PROMISE, 2), range(8)))
    torchs.eye.assert_called_once_with(2, device="cuda:0")
    torchs.linalg.eigh.assert_called_once_with(torchs.eye.return_value)


def test_a_device_that_does_not_work_is_one_error(torchs: MagicMock) -> None:
    torchs.eye.side_effect = RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
    with pytest.raises(MergemillError, match="the cuda device here does not work: CUDA error: no kernel image is avai"):
        open_device("cuda", PROMISE, 2)


class Allocator:
    """torch's, for a device of 80 GiB of which 20 GiB are held, and some more is cached."""

    def __init__(self, torchs: MagicMock) -> None:
        self.fraction, self.cached_bytes = 0.75, 5 << 30
        torchs.memory_reserved.side_effect = lambda device: (20 << 30) + self.cached_bytes
        torchs.empty_cache.side_effect = self.empty_cache
        torchs.get_per_process_memory_fraction.side_effect = lambda device: self.fraction
        torchs.set_per_process_memory_fraction.side_effect = self.limit

    def empty_cache(self) -> None:
        self.cached_bytes = 0

    def limit(self, fraction: float, device: int) -> None:
        self.fraction = fraction

    @property
    def beside_bytes(self) -> float:
        return self.fraction * (80 << 30) - (20 << 30)


def test_torchs_own_limit_ends_with_the_merge_and_has_room_for_whole_segments(torchs: MagicMock) -> None:
    allocator = Allocator(torchs.cuda)
    place = Accelerator("cuda", 1 << 21, 2)
    with place.limited():
        assert 64 << 20 < allocator.beside_bytes < 1 << 30
        for _ in range(2):
            with place.lend(1 << 20):
                pass
        assert torchs.empty.call_count == 1
        allocator.cached_bytes = 3 << 30
    assert allocator.fraction == 0.75
    assert allocator.cached_bytes == 0
    with place.lend(1 << 20):
        assert torchs.empty.call_count == 2  # no free arena was left in the device


def test_merges_that_overlap_have_room_for_all_of_them_and_the_last_ends_the_limit(torchs: MagicMock) -> None:
    allocator = Allocator(torchs.cuda)
    first, second = (Accelerator("cuda", promise << 30, 1).limited() for promise in (4, 8))
    with first:
        of_first = allocator.beside_bytes
        assert 4 << 30 < of_first < 6 << 30
        second.__enter__()
        of_both = allocator.beside_bytes
        assert 12 << 30 < of_both < 16 << 30
    assert allocator.beside_bytes == pytest.approx(of_both - of_first)
    second.__exit__(None, None, None)
    assert allocator.fraction == 0.75


def test_a_merge_that_loses_its_device_ends_with_its_own_error(torchs: MagicMock) -> None:
    allocator = Allocator(torchs.cuda)
    torchs.cuda.empty_cache.side_effect = [None, RuntimeError("CUDA error: an illegal memory access was encountered")]
    with pytest.raises(RunError, match="of its own"), Accelerator("cuda", PROMISE, 1).limited():
        raise RunError("of its own")
    assert allocator.fraction == 0.75


class Failing:
    """What raises an error on the device, in the place of `Merging._combine`, and weakly holds what was there."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error
        self.there: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, merging: Merging, span: Span, work: Workspace, dtype: str, watch: Any) -> torch.Tensor:
        assert work.lanes is not None
        taken = work.take((span.size,), "F32")
        self.there += [weakref.ref(taken), weakref.ref(work.lanes._arena)]
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "CUDA", "cuBLAS"],
)
def test_a_device_that_is_full_is_told_and_the_error_holds_none_of_its_memory(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = mills(tmp_path)
    failing = Failing(error)
    monkeypatch.setattr(Merging, "_combine", lambda *given: failing(*given))
    with pytest.raises(RunError) as told:
        there.merge(make_task("linear", make_values(SMALL)))
    first_line = str(error).splitlines()[0]
    assert str(told.value).endswith(f"--device-memory promises; give less, or free some: {first_line}")
    assert there._keeping.device is not None
    there._keeping.device.drop_free()
    gc.collect()
    assert [each() for each in failing.there] == [None, None]


def test_another_error_of_a_device_goes_on_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = mills(tmp_path)
    failing = Failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(Merging, "_combine", lambda *given: failing(*given))
    with pytest.raises(RuntimeError, match="an illegal memory access") as told:
        there.merge(make_task("linear", make_values(SMALL)))
    assert told.value is failing.error


def test_workers_with_a_device_have_room_for_its_context_on_the_host() -> None:
    assert make_limit(PROMISE, "cuda") == make_limit(PROMISE + CONTEXT_BYTES)


def test_memory_that_cannot_be_pinned_is_told_and_pins_end_with_their_arena() -> None:
    class Runtime:
        error = 0
        pinned: ClassVar[set[int]] = set()

        def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
            if not self.error:
                self.pinned.add(address)
            return self.error

        def cudaHostUnregister(self, address: int) -> int:
            self.pinned.remove(address)
            return 0

    runtime = Runtime()
    place = SimulatedPlace(PROMISE, 1)
    with patch.object(place, "pin", lambda arena: pin_memory(arena, runtime)):
        workplace = workers_place(place)
        with workplace.lend(1 << 20):
            assert len(runtime.pinned) == 1
        del workplace
    assert not runtime.pinned
    runtime.error = 2
    with (
        patch.object(place, "pin", lambda arena: pin_memory(arena, runtime)),
        pytest.raises(MergemillError, match=r"CUDA error 2: .* of memory cannot be pinned"),
        workers_place(place).lend(1 << 20),
    ):
        pass


def test_an_error_of_pinning_is_not_told_to_the_next_kernel_too(torchs: MagicMock) -> None:
    torchs.cuda.cudart.return_value.cudaHostRegister.return_value = 2
    torchs.ones.side_effect = RuntimeError("CUDA error: out of memory")
    with (
        pytest.raises(MergemillError, match=r"cannot be pinned; free memory, or give a smaller --memory"),
        Workplace(PROMISE, 1, device=Accelerator("cuda", PROMISE, 1)).lend(1 << 20),
    ):
        pass
    torchs.ones.assert_called_once_with(1, device="cuda:0")
