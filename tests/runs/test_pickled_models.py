"""Models that ``torch.save`` wrote are merged to the bytes that the same models in safetensors give."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.torch_files import write_torch
from hubs import use_hub
from models import read_tensors, write_llama
from runs.buckets import new_place
from runs.merging import ISSUE_METHODS, SMALL_PART, hash_output, make_recipe_of, parts_of, plan_merge
from servers.hub import Hub
from servers.s3 import S3

from mergemill.engine import describe_plan, inspect, merge, run, verify
from mergemill.engine.errors import RunError
from mergemill.engine.plan.memory import stream_bytes

NAMES = ("base", "A", "B")
Tensors = dict[str, torch.Tensor]
Write = Callable[[Path, Tensors], None]


def write_single(folder: Path, tensors: Tensors) -> None:
    write_torch(folder / "pytorch_model.bin", tensors)


def write_old(folder: Path, tensors: Tensors) -> None:
    write_torch(folder / "pytorch_model.bin", tensors, zipped=False)


def write_sharded(folder: Path, tensors: Tensors) -> None:
    weight_map = {}
    for i in range(3):
        name = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = dict(list(tensors.items())[i::3])
        write_torch(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_training(folder: Path, tensors: Tensors) -> None:
    write_torch(folder / "last.ckpt", {"state_dict": tensors, "epoch": 1, "optimizer_states": [{"m": torch.ones(9)}]})


def write_transposed(folder: Path, tensors: Tensors) -> None:
    """Matrices lie transposed, norms as rows of one storage."""
    rows = torch.stack([tensor for tensor in tensors.values() if tensor.dim() == 1])
    norms = iter(rows)
    write_torch(
        folder / "model.pt",
        {name: next(norms) if each.dim() == 1 else each.t().contiguous().t() for name, each in tensors.items()},
    )


WRITERS: dict[str, Write] = {
    "one file": write_single,
    "before 1.6": write_old,
    "shards": write_sharded,
    "training": write_training,
    "transposed": write_transposed,
}


def pickle_family(family: Path, folder: Path, write: Write) -> Path:
    """Write the models of a family again, by torch, and everything beside their weights as it is."""
    for name in NAMES:
        shutil.copytree(family / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        write(folder / name, read_tensors(family / name))
    return folder


def hash_weights(out: Path) -> dict[str, str]:
    """Return the hashes of all files but those that name the models."""
    return {name: found for name, found in hash_output(out).items() if name not in ("README.md", "recipe.yml")}


@pytest.fixture(scope="module")
def pickled(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family in one ``pytorch_model.bin`` each. Not to be changed."""
    return pickle_family(family, tmp_path_factory.mktemp("pickled"), write_single)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pickled_model_is_merged_to_the_bytes_of_its_safetensors(kind: str, family: Path, tmp_path: Path) -> None:
    models = pickle_family(family, tmp_path / "models", WRITERS[kind])
    for folder, out in ((family, "expected"), (models, "out")):
        run(plan_merge("ties", folder), tmp_path / out, workers=0, threads=2)
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")
    with parts_of(SMALL_PART):
        assert verify(tmp_path / "out", replay=2).replayed == 2


@pytest.mark.parametrize("method", ISSUE_METHODS)
def test_every_kind_of_method_takes_pickled_models(method: str, family: Path, pickled: Path, tmp_path: Path) -> None:
    for folder, out in ((family, "expected"), (pickled, "out")):
        run(plan_merge(method, folder), tmp_path / out, workers=0, threads=2)
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_tensors_that_lie_transposed_take_the_memory_that_the_plan_says(
    method: str, family: Path, tmp_path: Path
) -> None:
    models = pickle_family(family, tmp_path / "models", write_transposed)
    plan = plan_merge(method, models)
    need = max(map(stream_bytes, plan.parts))
    run(plan, tmp_path / "out", workers=0, threads=1, memory=need)
    run(plan_merge(method, family), tmp_path / "expected", workers=0, threads=1)
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")


def test_what_was_left_out_of_an_input_is_told_with_the_plan(family: Path, tmp_path: Path) -> None:
    models = pickle_family(family, tmp_path / "models", write_training)
    told = describe_plan(plan_merge("linear", models))["warnings"]
    assert told[0] == (
        f"{models}/A/last.ckpt: only the tensors of the model are read of it; left out: epoch, optimizer_states"
    )
    assert len(told) == 2


def test_a_pickled_model_is_merged_from_s3(s3: S3, family: Path, pickled: Path, tmp_path: Path) -> None:
    place = new_place(s3)
    for path in sorted(pickled.rglob("*")):
        if path.is_file():
            place.put(str(path.relative_to(pickled)), path.read_bytes())
    run(plan_merge("linear", place.url), tmp_path / "out", workers=0, threads=2)
    run(plan_merge("linear", family), tmp_path / "expected", workers=0, threads=2)
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")


def test_a_pickled_model_is_merged_from_the_hub(hub: Hub, family: Path, pickled: Path, tmp_path: Path) -> None:
    for name in NAMES:
        hub.add_repo(f"org/{name}", {path.name: path for path in (pickled / name).iterdir()})
    with use_hub(hub, tmp_path / "home"):
        run(plan_merge("linear", "hf://org"), tmp_path / "out", workers=0, threads=2)
    run(plan_merge("linear", family), tmp_path / "expected", workers=0, threads=2)
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")


def test_an_input_that_is_written_again_meanwhile_is_another(pickled: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(pickled, tmp_path / "models"))
    plan = plan_merge("linear", models)
    path = models / "A" / "pytorch_model.bin"
    write_torch(path, torch.load(path, weights_only=True))
    os.utime(path, ns=(1, 1))
    with pytest.raises(RunError, match=r"pytorch_model\.bin: changed since the plan was made"):
        run(plan, tmp_path / "out", workers=0, threads=1)


def test_two_models_of_one_file_are_merged(tmp_path: Path) -> None:
    values = {name: {"model.layers.0.w": torch.full((4,), float(i))} for i, name in enumerate(("params", "params_ema"))}
    path = write_torch(tmp_path / "x.pth", values)
    models = [{"model": f"{path}#{name}", "parameters": {"weight": 0.5}} for name in values]
    merge(make_recipe_of({"merge_method": "linear", "models": models}), tmp_path / "out", workers=0)
    (merged,) = read_tensors(tmp_path / "out").values()
    assert merged.tolist() == [0.5] * 4
    assert verify(tmp_path / "out", replay=1).replayed == 1


def test_a_pickled_model_is_inspected(pickled: Path) -> None:
    found = inspect(pickled / "A")
    assert (found.kind, found.shards, found.layers) == ("checkpoint", 1, {"model.layers": 2})


def test_a_tied_model_gives_what_it_gives_in_safetensors(tmp_path: Path) -> None:
    a = write_llama(tmp_path / "st" / "a", seed=1, layers=1, tied=True)
    b = write_llama(tmp_path / "st" / "b", seed=2, layers=1, tied=True, near=a)
    for each in (a, b):
        folder = tmp_path / "pt" / each.name
        shutil.copytree(each, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = read_tensors(each)
        write_torch(folder / "pytorch_model.bin", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    for kind in ("st", "pt"):
        models = [{"model": str(tmp_path / kind / x), "parameters": {"weight": 0.5}} for x in "ab"]
        merge(make_recipe_of({"merge_method": "linear", "models": models}), tmp_path / f"out-{kind}", workers=0)
    assert hash_weights(tmp_path / "out-pt") == hash_weights(tmp_path / "out-st")
