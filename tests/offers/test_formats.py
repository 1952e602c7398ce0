"""A format is one file and one line: values and scales that are one tensor for everything after."""

from pathlib import Path

import pytest
import torch
from models import read_tensors
from offers.toy_format import offer_zoomed
from runs.merging import SMALL_PART, hash_output, make_recipe_of, parts_of
from safetensors.torch import save_file

from mergemill.engine import make_plan, run
from mergemill.engine.errors import PlanError
from mergemill.engine.offers import formats

ROWS, COLUMNS = 600, 500
NAME = "layers.0.weight"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (offer_zoomed, *formats.FORMATS))


def write_zoomed(folder: Path, seed: int) -> torch.Tensor:
    """Write a model whose matrix is bytes and a zoom; return what it means."""
    folder.mkdir()
    stream = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (ROWS, COLUMNS), generator=stream).to(torch.int8)
    zoom = torch.rand(ROWS, generator=stream) / 64
    save_file({NAME: values, f"{NAME}.zoom": zoom, "norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return values.float() * zoom[:, None]


def write_plain(folder: Path, values: torch.Tensor) -> None:
    folder.mkdir()
    save_file({NAME: values, "norm.weight": torch.ones(4)}, folder / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_of_a_new_format_gives_the_bytes_of_what_it_means(method: str, dtype: str, tmp_path: Path) -> None:
    for seed, name in enumerate(["base", "a"]):
        write_plain(tmp_path / f"plain-{name}", write_zoomed(tmp_path / name, seed))
    hashes = set()
    for prefix in ("", "plain-"):
        base, model = str(tmp_path / f"{prefix}base"), str(tmp_path / f"{prefix}a")
        parameters = {"linear": {"weight": 0.4}, "slerp": {"t": 0.3}}.get(method, {"weight": 0.4, "density": 0.3})
        parameters = {key: parameters[key] for key in parameters if method == "ties" or key != "density"}
        body = {"merge_method": method, "base_model": base, "models": [{"model": base}, {"model": model}]}
        if method == "linear":
            del body["base_model"]
        with parts_of(SMALL_PART):
            plan = make_plan(make_recipe_of({**body, "parameters": parameters, "dtype": dtype}))
        assert len([part for part in plan.parts if part.pieces[0].tensor.name == NAME]) > 1, "it is cut"
        out = tmp_path / f"out-{prefix}{method}"
        run(plan, out, workers=0)
        hashes.add((out / "model-00001-of-00001.safetensors").read_bytes())
    assert len(hashes) == 1


def test_the_ledger_accounts_for_values_and_scales(tmp_path: Path) -> None:
    write_zoomed(tmp_path / "a", 1)
    plan = make_plan(make_recipe_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}))
    (source,) = plan.sources
    assert (source.tensors, source.copied, dict(source.dropped)) == (3, 3, {})
    assert source.read_bytes == ROWS * COLUMNS + 4 * ROWS + 16
    out = tmp_path / "out"
    run(plan, out, workers=0)
    assert read_tensors(out)[NAME].dtype == torch.float32


def test_without_the_format_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS[1:])
    write_zoomed(tmp_path / "a", 1)
    write_plain(tmp_path / "b", write_zoomed(tmp_path / "c", 2))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in "ab"]
    with pytest.raises(PlanError, match="quantized"):
        make_plan(make_recipe_of({"merge_method": "linear", "models": models}))


def test_the_same_model_hashes_the_same(tmp_path: Path) -> None:
    write_zoomed(tmp_path / "a", 1)
    recipe = make_recipe_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]})
    for name in ("one", "two"):
        run(make_plan(recipe), tmp_path / name, workers=0)
    assert hash_output(tmp_path / "one") == hash_output(tmp_path / "two")
