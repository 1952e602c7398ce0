"""Merging in memory gives the bytes that the files' route writes, and says what is wrong with its arguments."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from models import read_tensors, write_llama
from torch import Tensor

from mergemill.engine import make_plan, merge_state_dicts, merge_tensors, run
from mergemill.engine.errors import MergeError, PlanError
from mergemill.engine.methods import find_methods, merge_method
from mergemill.engine.methods.contract import Method, Parameter
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.tensors.slabs import BLOCK, SLAB

METHODS = tuple(find_methods())
Folder = Path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Models ``base``, ``a``, ``b``, ``c`` with tensors of several blocks, buffers, scalars and empties."""
    folder = tmp_path_factory.mktemp("zoo")
    sizes: dict[str, Any] = {"layers": 1, "vocab": 1500, "hidden": 128, "extras": ("integer", "bool", "scalar")}
    base = write_llama(folder / "base", seed=0, **sizes)
    for seed, (name, dtype) in enumerate({"a": "bfloat16", "b": "float32", "c": "float16"}.items(), start=1):
        write_llama(folder / name, seed=seed, near=base, dtype=dtype, **sizes)
    return folder


def required(method: Method) -> Mapping[str, Any]:
    """Return a value for each parameter that a method needs, and a density that drops something."""
    return {p.name: value_of(p) for p in method.parameters if p.required or p.name == "density"}


def value_of(parameter: Parameter) -> Any:
    return parameter.kind(1 if parameter.kind is int else 0.4)


def merge_files(method: Method, names: list[str], base: str | None, folder: Folder, out: Path, seed: int) -> Any:
    """Return what the files' route writes for a recipe without buffers' settings."""
    recipe: dict[str, Any] = {
        "merge_method": method.name,
        "models": [{"model": str(folder / name)} for name in names],
        "parameters": dict(required(method)),
    }
    recipe |= {"base_model": str(folder / base)} if base else {}
    run(make_plan(parse_recipe(str(recipe)), seed=seed), out, workers=0, threads=1)
    return read_tensors(out)


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_are_those_of_a_merge_of_files(name: str, zoo: Folder, tmp_path: Path) -> None:
    method = find_methods()[name]
    names = ["a", "b", "c"][: method.most_inputs]
    if method.base == "first of two":
        names = ["b"]
    base = None if method.base == "none" else "base"
    expected = merge_files(method, names, base, zoo, tmp_path / "out", seed=5)
    models = [read_tensors(zoo / model) for model in names]
    merged = merge_state_dicts(
        models, name, base=read_tensors(zoo / base) if base else None, seed=5, **required(method)
    )
    assert list(merged) == list(models[0])
    assert merged.keys() == expected.keys()
    for tensor, value in expected.items():
        assert (merged[tensor].dtype, merged[tensor].shape) == (value.dtype, value.shape)
        assert torch.equal(merged[tensor].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), tensor


def make_tensors(*shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    stream = np.random.default_rng(3)
    return [torch.from_numpy(np.asarray(stream.standard_normal(shape))).to(dtype) for _ in range(count)]


def test_one_tensor_is_merged_as_in_a_state_dict() -> None:
    base, *models = make_tensors(70, 3000)
    settings: dict[str, Any] = {"weight": 1.0, "density": [0.3, 0.5], "rescale": False, "lambda_": 0.7}
    alone = merge_tensors(models, "dare_ties", base=base, seed=3, name="w", **settings)
    states = [{"w": model} for model in models]
    within = merge_state_dicts(states, "dare_ties", base={"w": base}, seed=3, **settings)
    assert torch.equal(alone, within["w"])
    assert not torch.equal(alone, merge_tensors(models, "dare_ties", base=base, seed=4, name="w", **settings))
    assert not torch.equal(alone, merge_tensors(models, "dare_ties", base=base, seed=3, name="v", **settings))


def test_a_sequence_gives_each_model_its_own_and_a_number_all() -> None:
    a, b, _ = make_tensors(100)
    weighted = merge_tensors([a, b], "linear", weight=[0.75, 0.25])
    assert torch.equal(weighted, a * 0.75 + b * 0.25)
    assert torch.equal(merge_tensors([a, b], "linear", weight=2), (a * 2 + b * 2) / 4)
    assert torch.equal(merge_tensors([a, b], "linear", weight=np.float32(2)), (a * 2 + b * 2) / 4)


def test_a_name_that_python_keeps_for_itself_can_be_written_either_way() -> None:
    base, a, _ = make_tensors(100)
    half = merge_tensors([a], "task_arithmetic", base=base, weight=1, lambda_=0.5)
    assert torch.equal(half, merge_tensors([a], "task_arithmetic", base=base, weight=1, **{"lambda": 0.5}))
    assert not torch.equal(half, merge_tensors([a], "task_arithmetic", base=base, weight=1))


def test_the_base_of_two_is_given_apart_or_as_the_first() -> None:
    base, a, _ = make_tensors(100)
    assert torch.equal(merge_tensors([a], "slerp", base=base, t=0.3), merge_tensors([base, a], "slerp", t=0.3))


def strided(values: Tensor, how: str) -> Tensor:
    """Return the same values with other strides."""
    if how == "transposed":
        return values.t().contiguous().t()
    if how == "every other":
        wide = torch.empty(*values.shape, 2, dtype=values.dtype)
        wide[..., 0] = values
        return wide[..., 0]
    if how == "expanded":
        return values[:1].expand(values.shape)
    return torch.nn.Parameter(values)


@pytest.mark.parametrize("shape", [(300, 2000), (1, 3, 2000), (SLAB + 7,)], ids=str)
@pytest.mark.parametrize("how", ["transposed", "every other", "expanded", "parameter"])
def test_strides_and_gradients_do_not_matter(how: str, shape: tuple[int, ...]) -> None:
    if how == "transposed" and len(shape) != 2:
        pytest.skip("only matrices have a transpose")
    base, *models = make_tensors(*shape)
    odd = [strided(tensor, how) for tensor in (base, *models)]
    plain = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in odd]
    merged = merge_tensors(odd[1:], "ties", base=odd[0], weight=1.0, density=0.4)
    assert torch.equal(merged, merge_tensors(plain[1:], "ties", base=plain[0], weight=1.0, density=0.4))
    assert (merged.device.type, merged.requires_grad, merged.is_contiguous()) == ("cpu", False, True)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(odd, plain, strict=True)), "inputs are not changed"


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_changed(name: str) -> None:
    method = find_methods()[name]
    base, *models = make_tensors(2, BLOCK + 5, count=4)
    kept = [tensor.clone() for tensor in (base, *models)]
    needs = method.base in ("required", "first of two")
    given = models[: (method.most_inputs or 3) - (method.base == "first of two")]
    merge_tensors(given, name, base=base if needs else None, **required(method))
    assert all(torch.equal(tensor, before) for tensor, before in zip((base, *models), kept, strict=True))


def test_a_copied_tensor_is_a_new_one() -> None:
    (a,) = make_tensors(10, count=1)
    copied, number = merge_tensors([a], "passthrough"), merge_tensors([torch.arange(4)], "linear", weight=1)
    assert torch.equal(copied, a)
    assert copied.data_ptr() != a.data_ptr()
    assert number.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,)], ids=str)
def test_scalars_and_empties_merge(shape: tuple[int, ...]) -> None:
    base, *models = make_tensors(*shape)
    assert merge_tensors(models, "ties", base=base, weight=1.0, density=0.5).shape == shape


def test_dtypes_promote_or_are_chosen() -> None:
    (a,), (b,) = make_tensors(50, count=1, dtype=torch.bfloat16), make_tensors(50, count=1, dtype=torch.float16)
    assert merge_tensors([a, b], "linear", weight=1).dtype == torch.float32
    wide = merge_state_dicts([{"w": a}, {"w": b}], "linear", dtype=torch.float64, weight=[1, 2])["w"]
    assert wide.dtype == torch.float64
    assert torch.equal(wide, (a.double() + b.double() * 2) / 3)


def test_modules_are_merged_and_tied_names_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 8)
            self.head = torch.nn.Linear(8, 20, bias=False)
            self.norm = torch.nn.BatchNorm1d(8)
            self.head.weight = self.embedding.weight

    base, a, b = Tied(), Tied(), Tied()
    merged = merge_state_dicts([a, b], "dare_linear", base=base, weight=0.5, density=0.5)
    assert list(merged) == list(a.state_dict())
    assert merged["head.weight"] is merged["embedding.weight"]
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    target = Tied()
    target.load_state_dict(merged)
    assert torch.equal(target.head.weight, merged["embedding.weight"])


def test_names_that_one_model_alone_ties_are_merged_apart() -> None:
    (a, b), shared = make_tensors(10, count=2), torch.ones(10)
    merged = merge_state_dicts([{"x": shared, "y": shared}, {"x": a, "y": b}], "linear", weight=1)
    assert not torch.equal(merged["x"], merged["y"])


def test_the_memory_is_that_of_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergemill.engine.runs import in_memory

    lent: list[int] = []

    class Counting(in_memory.Workplace):
        def __init__(self, memory_bytes: int, threads: int) -> None:
            lent.append(memory_bytes)
            super().__init__(memory_bytes, threads)

    monkeypatch.setattr(in_memory, "Workplace", Counting)
    for blocks in (8, 64):
        merge_tensors(make_tensors(blocks * BLOCK), "linear", weight=1)
    assert lent[0] == lent[1] < 64 * BLOCK * 4


def test_a_function_of_the_session_is_a_method_too() -> None:
    @merge_method(reads="element")
    def largest(models: list[Tensor], *, scale: float = 1.0) -> Tensor:
        return functools.reduce(torch.maximum, models).mul_(scale)

    a, b, _ = make_tensors(100)
    assert torch.equal(merge_tensors([a, b], largest, scale=2), torch.maximum(a, b) * 2)


X, Y = torch.zeros(4, 4), torch.ones(4, 4)
WRONG: Mapping[str, tuple[list[Any], str, dict[str, Any], str]] = MappingProxyType(
    {
        "unknown method": ([X, Y], "tise", {}, "unknown merge_method 'tise'; did you mean 'ties'?"),
        "too few models": ([], "ties", {"base": X, "weight": 1}, "ties takes at least 1 model beside the base; here"),
        "too many models": ([X, Y], "passthrough", {}, "passthrough takes exactly 1 model; here are 2"),
        "too many for two": ([X, Y, X], "slerp", {"t": 1}, "slerp takes exactly 2 models, one of them the base; here"),
        "base and two": ([X, Y], "slerp", {"t": 1, "base": X}, "slerp takes exactly 2 models, one of them the base"),
        "no base": ([X, Y], "ties", {"weight": 1}, "ties needs 'base'"),
        "a base too much": ([X], "linear", {"base": Y, "weight": 1}, "linear takes no base; give every model among"),
        "unknown parameter": ([X], "linear", {"wieght": 1}, "takes no parameter 'wieght'; did you mean 'weight'?"),
        "far parameter": ([X], "slerp", {"zzz": 1, "base": Y}, "slerp takes no parameter 'zzz'; it takes t"),
        "missing parameter": ([X], "linear", {}, "parameter 'weight' of model 1 has no value for tensor tensor"),
        "out of range": (
            [X, Y], "ties", {"base": X, "weight": 1, "density": [1, 2]},
            "parameter 'density' of model 2 for tensor tensor is 2; it must be from 0 to 1",
        ),
        "no number": ([X], "linear", {"weight": "much"}, "parameter 'weight' of model 1 for tensor tensor is 'much'"),
        "an object": ([X], "linear", {"weight": X}, "parameter 'weight' is a Tensor; it must be a number, true"),
        "too many values": ([X, Y], "linear", {"weight": [1, 2, 3]}, "parameter 'weight' has 3 values for 2 models"),
        "several for one": ([X], "slerp", {"base": Y, "t": [1, 2]}, "parameter 't' is [1, 2]; there is one for all"),
        "shapes": ([X, Y[:2]], "linear", {"weight": 1}, "model 1 has shape [4, 4], model 2 [2, 4]; shapes must match"),
        "no tensor": ([X, [1.0]], "linear", {"weight": 1}, "tensor tensor of model 2 is a list; it must be a torch"),
        "no values": ([X, X.to("meta")], "linear", {"weight": 1}, "of model 2 is torch.float32, torch.strided, with"),
        "sparse": ([X, X.to_sparse()], "linear", {"weight": 1}, "of model 2 is torch.float32, torch.sparse_coo; it"),
        "complex": ([X.to(torch.complex64)], "linear", {"weight": 1}, "of model 1 is torch.complex64, torch.str"),
        "two kinds": ([X, X.int()], "linear", {"weight": 1}, "tensor tensor is F32, I32; a buffer that is not"),
        "cancelling": ([X, Y], "linear", {"weight": [1, -1]}, "sum to zero; with normalize they must not"),
    }
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    tensors, method, more, words = WRONG[case]
    with pytest.raises(PlanError) as raised:
        merge_tensors(tensors, method, **more)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_method_is_named() -> None:
    with pytest.raises(PlanError, match="is no merge method; give the name of one, or a function with @merge_method"):
        merge_tensors([X], torch.maximum)


def test_names_that_some_lack_are_named() -> None:
    words = "merge_state_dicts: tensor y is in model 1, model 2 but not in base; only models with the same tensors"
    with pytest.raises(PlanError, match=words):
        merge_state_dicts([{"x": X, "y": Y}] * 2, "ties", base={"x": X}, weight=1)
    with pytest.raises(PlanError, match="tensor z is in model 2 but not in model 1"):
        merge_state_dicts([{"x": X}, {"x": X, "z": X}], "linear", weight=1)


def test_a_model_that_is_none_is_named() -> None:
    with pytest.raises(PlanError, match="a model is a list; it must be a state dict or a"):
        merge_state_dicts([[X]], "linear", weight=1)  # type: ignore[list-item]


def test_integers_that_differ_are_an_error() -> None:
    with pytest.raises(
        MergeError, match="n: model 1 and model 2 hold different values, and I64 tensors are not merged"
    ):
        merge_state_dicts([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], "linear", weight=1)


def test_a_dtype_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"dtype is torch.int8; it must be one of float64, float32, float16, bfloat16"):
        merge_state_dicts([{"n": X}], "linear", dtype=torch.int8, weight=1)
