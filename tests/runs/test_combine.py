"""Adapters that are combined to one: by peft's formulas as peft does, and by methods in three spaces."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_gpt2, make_llama, peft, write_adapter, write_model
from models import read_tensors
from safetensors.torch import load_file

from mergemill.cli.main import execute
from mergemill.engine import make_adapter_plan, make_plan, run, verify
from mergemill.engine.errors import PlanError, RecipeError

WEIGHTS = "adapter_model.safetensors"
ALL = ["q_proj", "down_proj", "gate_proj"]
WEIGHED = (0.7, -0.4)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Write a base and adapters of it, and return where, and the base."""
    folder, base = tmp_path_factory.mktemp("adapters"), make_llama()
    write_model(base, folder / "base")
    write_adapter(base, folder / "a", seed=1, r=4, lora_alpha=6, target_modules=ALL)
    write_adapter(base, folder / "b", seed=2, r=4, lora_alpha=2, target_modules=ALL)
    write_adapter(base, folder / "wide", seed=3, r=7, lora_alpha=7, use_rslora=True, target_modules=ALL[:2])
    return folder, base


def document(folder: Path, *names: str, weights: tuple[float, ...] = WEIGHED, **more: Any) -> dict[str, Any]:
    entries = [
        {"adapter": str(folder / name), "parameters": {"weight": weight}}
        for name, weight in zip(names, weights, strict=False)
    ]
    return {"adapters": entries, **more}


def combine(given: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Return the change of each module of the result."""
    run(make_adapter_plan(given), out, workers=0)
    return find_changes(out)


def find_changes(folder: Path) -> dict[str, torch.Tensor]:
    """Return s·B·A of each module of an adapter."""
    found, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    changes = {}
    for key, a in found.items():
        if ".lora_A." not in key:
            continue
        rank, module = len(a), key.removesuffix(".lora_A.weight")
        name = module.removeprefix("base_model.model.")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        changes[name] = scale * found[f"{module}.lora_B.weight"].double() @ a.double()
    return changes


def combine_by_peft(folder: Path, base: Any, names: tuple[str, ...], **how: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folder / name, adapter_name=name)
        model.add_weighted_adapter(list(names), list(WEIGHED), "made", **how)
        return {
            name.removeprefix("base_model.model."): module.get_delta_weight("made").detach().double()
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and "made" in module.lora_A
        }


SIGNS = {"majority_sign_method": "frequency"}
TYPES = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.4},
    "ties_svd": {"density": 0.5, "svd_rank": 5},
    "magnitude_prune_svd": {"density": 0.4, "svd_rank": 6},
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_combination_type_is_what_peft_makes(kind: str, adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, base = adapters
    for number, more in enumerate([{}, SIGNS] if "ties" in kind else [{}]):
        settings = {**TYPES[kind], **more}
        expected = combine_by_peft(folder, base, ("a", "b"), combination_type=kind, **settings)
        out = tmp_path / f"out{number}"
        found = combine(document(folder, "a", "b", combination_type=kind, parameters=settings), out)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)
        assert not [each for each in told if "missing" in str(each.message) or "unexpected" in str(each.message)]
        merged = loaded.merge_and_unload().state_dict()
        for name, value in expected.items():
            change = merged[f"{name}.weight"].double() - base.state_dict()[f"{name}.weight"].double()
            torch.testing.assert_close(change, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
def test_what_is_dropped_at_random_keeps_its_mean(kind: str, adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapters
    given = document(folder, "a", weights=(1.0,), combination_type=kind, parameters={"density": 0.5, "svd_rank": 32})
    found, whole = combine(given, tmp_path / "out"), find_changes(folder / "a")
    again = combine(given, tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in found.items())
    if kind == "dare_ties_svd":
        shares = [float((value.abs() > 1e-4).double().mean()) for value in found.values()]
        assert 0.45 < sum(shares) / len(shares) < 0.55
        for name, value in found.items():
            kept = value.abs() > 1e-4
            torch.testing.assert_close(value[kept], 2 * whole[name][kept], rtol=1e-3, atol=1e-4)


def test_cat_and_svd_are_the_sum_of_changes_whatever_the_scales(adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapters
    one, other = find_changes(folder / "a"), find_changes(folder / "wide")
    for number, (kind, settings) in enumerate({"cat": {}, "svd": {"svd_rank": 11}}.items()):
        given = document(folder, "a", "wide", combination_type=kind, parameters=settings)
        found = combine(given, tmp_path / f"out{number}")
        assert found.keys() == one.keys() | other.keys()
        for name, value in found.items():
            wanted = 0.7 * one[name] - 0.4 * other.get(name, torch.zeros(()))
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
def test_methods_work_in_every_space(space: str, adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, base = adapters
    one, other = find_changes(folder / "a"), find_changes(folder / "wide")
    given = document(folder, "a", "wide", merge_method="task_arithmetic", space=space)
    found = combine(given, tmp_path / "sum")
    for name, value in found.items():
        wanted = 0.7 * one[name] - 0.4 * other.get(name, torch.zeros(()))
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    write_adapter(base, folder / f"twin-{space}", seed=1, r=4, lora_alpha=6, target_modules=ALL)
    same = document(folder, "a", f"twin-{space}", weights=(1.0, 1.0), merge_method="ties", space=space, rank=4)
    same["parameters"] = {"density": 1.0}
    for name, value in combine(same, tmp_path / "same").items():
        torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-5)
    ties = document(folder, "a", "b", weights=(1.0, 0.5), merge_method="ties", space=space, rank=3)
    ties["parameters"] = {"density": 0.5}
    made = combine(ties, tmp_path / "ties")
    assert all(torch.linalg.matrix_rank(value) <= 3 for value in made.values())
    assert verify(tmp_path / "ties", replay=1).replayed == 1


def test_a_method_in_the_space_of_changes_is_its_merge_of_models(adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, base = adapters
    parameters = {"density": 0.5}
    given = document(folder, "a", "b", merge_method="ties", parameters=parameters)
    found = combine(given, tmp_path / "out")
    models = [
        {"model": f"{folder / 'base'}+{folder / name}", "parameters": {"weight": weight}}
        for name, weight in zip("ab", WEIGHED, strict=True)
    ]
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models, "parameters": parameters}
    run(make_plan({**recipe, "dtype": "float32"}), tmp_path / "merged", workers=0)
    merged, before = read_tensors(tmp_path / "merged"), base.state_dict()
    for name, value in found.items():
        change = merged[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert float((change - value).abs().max()) < 5e-6 or float((change - value).norm() / change.norm()) < 0.02


def test_the_command_line_knows_a_document_by_its_key_and_resizes(
    adapters: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapters
    (tmp_path / "adapters.yml").write_text(json.dumps(document(folder, "a", "b", combination_type="svd")))
    assert execute(["merge", str(tmp_path / "adapters.yml"), str(tmp_path / "out"), "--workers", "0"]) == 0
    assert execute(["plan", str(tmp_path / "adapters.yml")]) == 0
    assert "svd: 2 models into 12 tensors" in capsys.readouterr().out
    assert execute(["verify", str(tmp_path / "out"), "--replay", "1"]) == 0
    resize = ["resize-lora", str(folder / "wide"), str(tmp_path / "small"), "--max-rank", "3", "--workers", "0"]
    assert execute(resize) == 0
    whole, small = find_changes(folder / "wide"), find_changes(tmp_path / "small")
    for name, value in whole.items():
        values = torch.linalg.svdvals(value)
        assert float((value - small[name]).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)
    assert execute([*resize[:2], str(tmp_path / "least"), "--max-rank", "3", "--energy", "0.01", "--workers", "0"]) == 0
    assert json.loads((tmp_path / "least" / "adapter_config.json").read_text())["r"] == 1
    assert not (tmp_path / "missing").exists()


def test_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    base = make_gpt2()
    targets = ["c_fc", "c_proj"]
    for seed, name in enumerate("ab", 1):
        write_adapter(base, tmp_path / name, seed=seed, target_modules=targets, fan_in_fan_out=True)
    expected = combine_by_peft(tmp_path, base, ("a", "b"), combination_type="svd")
    found = combine(document(tmp_path, "a", "b", combination_type="svd"), tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].T, value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("space", ["delta", "core"])
def test_ranks_by_energy_are_the_least_that_keep_it_and_stand_in_the_recipe(
    space: str, adapters: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = adapters
    given = document(folder, "a", "b", merge_method="task_arithmetic", space=space)
    whole = combine(given, tmp_path / "whole")
    plan = make_adapter_plan({**given, "rank": {"energy": 0.8}})
    done = run(plan, tmp_path / "out", workers=0)
    assert bool(done.losses) == (space == "delta"), "in a small space nobody knows what is lost"
    ranks = set()
    for name, value in find_changes(tmp_path / "out").items():
        left, values, right = torch.linalg.svd(whole[name], full_matrices=False)
        kept = values.square().cumsum(0) / values.square().sum()
        rank = int((kept < 0.8).sum()) + 1
        ranks.add(rank)
        torch.testing.assert_close(value, left[:, :rank] * values[:rank] @ right[:rank], rtol=1e-4, atol=1e-6)
        assert json.loads(plan.origin.text)["rank"][name] == rank
    assert max(ranks) <= 8
    verify(tmp_path / "out", replay=2)
    most = make_adapter_plan({**given, "rank": {"energy": 0.8, "max_rank": 2}})
    assert set(json.loads(most.origin.text)["rank"].values()) <= {1, 2}


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ({"energy": 2}, "has an energy of the number 2; it is a share"),
        ({"energy": 0.5, "most": 3}, "by energy is {energy: SHARE}, or {energy: SHARE, max_rank: R}"),
        ({"q_proj": 0}, "has the number 0 for q_proj; ranks are whole numbers from 1 on"),
        ("half", "must be a whole number from 1 on, full, {energy: SHARE}, or ranks by module, not"),
    ],
)
def test_a_rank_that_is_none_is_refused(rank: object, words: str, adapters: tuple[Path, Any]) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        make_adapter_plan(document(adapters[0], "a", merge_method="linear", rank=rank))


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "a rank": (("a",), {"combination_type": "svd", "rank": 3}, "rank is for a merge_method; svd takes svd_rank"),
    "a module": (("a",), {"merge_method": "linear", "rank": {"q_proj": 3}}, "rank: says nothing of module"),
    "ranks": (("a", "wide"), {"combination_type": "ties"}, "have ranks 4, 7, and ties adds up factors of one; use"),
    "a type": (("a",), {"combination_type": "mean"}, "combination_type 'mean' is unknown; known are linear"),
    "a parameter": (("a",), {"combination_type": "svd", "parameters": {"rank": 3}}, "'rank' is unknown; known are"),
    "a density": (("a",), {"combination_type": "ties", "parameters": {"density": 2}}, "density is a share"),
    "twice": (("a", "a"), {"combination_type": "svd"}, "is named twice; name it once"),
    "slerp": (("a", "b"), {"merge_method": "slerp"}, "slerp goes from a base to one model, and adapters have none"),
    "dora": (("dora",), {"combination_type": "svd"}, "is DoRA, whose magnitudes do not add up"),
    "whole": (("whole",), {"combination_type": "svd"}, "stands for one of the base's and does not add up"),
    "bias": (("bias",), {"combination_type": "svd"}, "stands for one of the base's and does not add up"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, adapters: tuple[Path, Any], tmp_path: Path) -> None:
    folder, base = adapters
    names, more, message = REFUSED[case]
    special: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "whole": {"modules_to_save": ["norm"]},
        "bias": {"trainable_token_indices": [1]},
    }
    if case in special:
        write_adapter(base, tmp_path / case, **special[case])
    given = document(tmp_path if case in special else folder, *names, **more)
    with pytest.raises(PlanError, match=message):
        make_adapter_plan(given)


def test_a_document_needs_a_way(adapters: tuple[Path, Any]) -> None:
    folder, _ = adapters
    with pytest.raises(RecipeError, match="needs exactly one of combination_type, merge_method; none is here"):
        make_adapter_plan(document(folder, "a"))
