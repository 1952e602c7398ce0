"""Gates are what transformers' own hidden states say, computed once, within the memory that the plan says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixing import HIDDEN, LAYERS, mix, write_all, write_dense
from models import read_tensors
from runs.buckets import found_by_environment, new_place
from safetensors import safe_open
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import describe_plan, errors, make_plan, run, verify
from mergemill.engine.forward.layers import LayerSeen, ModelWeights, Pass, group_lengths, run_layers
from mergemill.engine.plan.layout import PART_BYTES
from mergemill.engine.runs.tasks import gates as gates_task
from mergemill.engine.runs.worker.workplace import MALLOC_BYTES

TESTS = str(Path(__file__).parents[1])
PROMPTS = {
    "b": (["a poem of the sea", "songs"], ["numbers and more numbers"]),
    "c": (["1 + 1 = 2", "there are three hundred and twelve of them"], []),
    "a": (["the"], ["songs"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("models"))


def say(models: Path, kind: str, mode: str, *names: str, **more: Any) -> dict[str, Any]:
    """Return a recipe of experts with prompts, by the letters of their models."""

    def expert(name: str) -> dict[str, Any]:
        positive, negative = PROMPTS[name]
        return {
            "source_model": str(models / f"{kind}-{name}"),
            "positive_prompts": positive,
            "negative_prompts": negative,
        }

    shared = {"shared_experts": [expert("a")]} if kind == "qwen2" else {}
    experts = [expert(name) for name in names or ("b", "c")]
    return {"base_model": str(models / f"{kind}-a"), "gate_mode": mode, "experts": experts, **shared, **more}


def find_states(folder: Path, prompt: str, mode: str) -> torch.Tensor:
    """Return by transformers what a prompt is in every layer, ``[layers, hidden]``."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(f"<s>{prompt}", add_special_tokens=False)
    routed: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: routed.append(given[0][0]))
    with torch.no_grad():
        states = model(torch.tensor([tokens["input_ids"]]), output_hidden_states=True).hidden_states
    inputs = routed if mode == "router_input" else [each[0] for each in states[:-1]]
    return torch.stack([each.mean(0) if mode == "hidden_avg" else each[-1] for each in inputs]).double()


def scale(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def expect(folder: Path, names: str, mode: str, *, contrast: bool = False) -> torch.Tensor:
    """Return ``[layers, experts, hidden]`` from the formula."""
    rows = []
    for name in names:
        means = [
            torch.stack([find_states(folder, each, mode) for each in texts]).mean(0) for texts in PROMPTS[name] if texts
        ]
        rows.append(means[0] - means[1] if len(means) > 1 else means[0])
    vectors = torch.stack(rows, 1)
    return scale(vectors - vectors.mean(1, keepdim=True) if contrast else vectors)


@pytest.mark.parametrize(
    ("kind", "mode", "contrast"),
    [
        ("qwen3", "hidden", False),
        ("qwen2", "hidden_avg", False),
        ("mistral", "router_input", False),
        ("llama", "hidden_last", True),
    ],
)
def test_rows_are_those_of_transformers_hidden_states(
    kind: str, mode: str, contrast: bool, models: Path, tmp_path: Path
) -> None:
    architecture = {"qwen3": "qwen3", "qwen2": "qwen"}.get(kind, "mixtral")
    made = mix(say(models, kind, mode, contrast=contrast, architecture=architecture), tmp_path / "out")
    module = "block_sparse_moe" if architecture == "mixtral" else "mlp"
    found = torch.stack([made[f"model.layers.{layer}.{module}.gate.weight"] for layer in range(LAYERS)])
    expected = expect(models / f"{kind}-a", "bc", mode, contrast=contrast)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    if kind == "qwen2":
        shared = torch.stack([made[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] for layer in range(LAYERS)])
        torch.testing.assert_close(shared.double(), expect(models / "qwen2-a", "a", mode), rtol=0, atol=2e-5)
    with safe_open(tmp_path / "out" / "gates.safetensors", framework="pt") as kept:
        assert torch.equal(kept.get_tensor("layers.1.gate"), found[1])
        report = json.loads(kept.metadata()["mergemill.routing"])
    singular = torch.linalg.svdvals(found[0].double())
    assert report["condition"][0] == pytest.approx(float(singular[0] / singular[0 if contrast else 1]), rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Routing" in card
    assert verify(tmp_path / "out", replay=9).replayed >= 1


def test_cheap_embeddings_are_sums_of_rows_and_equal_in_all_layers(models: Path, tmp_path: Path) -> None:
    import transformers

    made = mix(say(models, "llama", "cheap_embed", granularity=2), tmp_path / "out", workers=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "llama-a")
    rows = read_tensors(models / "llama-a")["model.embed_tokens.weight"].double()

    def point(texts: list[str]) -> torch.Tensor:
        tokens = [i for text in texts for i in tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"]]
        return scale(rows[tokens].sum(0)) if tokens else torch.zeros(HIDDEN, dtype=torch.float64)

    expected = torch.stack([scale(point(PROMPTS[name][0]) - point(PROMPTS[name][1])) for name in "bc"])
    for layer in range(LAYERS):
        found = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        torch.testing.assert_close(found, expected.repeat_interleave(2, 0), rtol=0, atol=1e-6)


def test_a_base_that_is_a_stage_is_run_from_its_expressions(models: Path, tmp_path: Path) -> None:
    stage = {
        "name": "mean",
        "merge_method": "ties",
        "base_model": str(models / "llama-a"),
        "models": [{"model": str(models / f"llama-{m}"), "parameters": {"weight": 1, "density": 0.5}} for m in "bc"],
    }
    run(make_plan({key: value for key, value in stage.items() if key != "name"}), tmp_path / "mean", workers=0)
    recipe = say(models, "llama", "hidden")
    made = mix({**recipe, "base_model": "mean", "stages": [stage]}, tmp_path / "out")
    again = mix({**recipe, "base_model": str(tmp_path / "mean")}, tmp_path / "again")
    for name in made:
        torch.testing.assert_close(made[name], again[name], rtol=0, atol=2e-5)


def test_gates_are_computed_once_also_where_a_run_is_killed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = say(models, "llama", "hidden")
    (tmp_path / "moe.json").write_text(json.dumps(recipe))
    expected = mix(tmp_path / "moe.json", tmp_path / "whole")
    for place in ("the pass", "after it"):
        assert die_in(place, tmp_path) == 9
        assert not (tmp_path / "out" / "config.json").exists()
    damaged = shutil.copytree(tmp_path / "out", tmp_path / "damaged") / ".mergemill" / "gates.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    again = mix(tmp_path / "moe.json", tmp_path / "damaged")
    monkeypatch.setattr(gates_task, "find_gates", lambda *given: pytest.fail("computed twice"))
    made = mix(tmp_path / "moe.json", tmp_path / "out")
    assert all(torch.equal(each[name], value) for name, value in expected.items() for each in (made, again))
    names = [sorted(each.name for each in (tmp_path / out).iterdir()) for out in ("out", "whole")]
    assert names[0] == names[1]
    assert not (tmp_path / "out" / ".mergemill" / "gates.safetensors").exists()
    kept = tmp_path / "out" / "gates.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.raises(errors.VerifyError, match=r"gates\.safetensors: changed since it was written"):
        verify(tmp_path / "out")


DIE = """
import os, sys
import mergemill.engine.runs.running as running
import mergemill.engine.runs.tasks.gates as gates
from mergemill.engine import merge
if sys.argv[1] == "the pass":
    gates.find_gates = lambda *given: os._exit(9)
else:
    keep, running.keep_gates = running.keep_gates, lambda *given: (keep(*given), os._exit(9))
merge("moe.json", "out", workers=0)
"""


def die_in(place: str, folder: Path) -> int:
    """Return how a process ends that is killed there."""
    done = subprocess.run([sys.executable, "-c", DIE, place], cwd=folder, capture_output=True, check=False)
    return done.returncode


def test_a_mixture_from_and_to_object_storage_is_that_of_a_disk(models: Path, tmp_path: Path, moto_server: S3) -> None:
    local = mix(say(models, "llama", "hidden"), tmp_path / "out")
    with found_by_environment(moto_server):
        there = [new_place(moto_server, name=f"llama-{name}").fill(models / f"llama-{name}") for name in "abc"]
        recipe = say(models, "llama", "hidden")
        recipe["base_model"] = there[0].url
        for expert, place in zip(recipe["experts"], there[1:], strict=True):
            expert["source_model"] = place.url
        out = new_place(moto_server)
        run(make_plan(recipe), out.url, workers=0)
        assert verify(out.url, replay=9).replayed >= 1
        found = out.read()
    assert found["gates.safetensors"] == (tmp_path / "out" / "gates.safetensors").read_bytes()
    assert found["model-00001-of-00001.safetensors"] == next((tmp_path / "out").glob("model-*")).read_bytes()
    assert not any(name.startswith(".mergemill/gates") for name in found)
    assert "model.layers.0.block_sparse_moe.gate.weight" in local


MEASURE = """
import json, os
from runs.memory import peak_bytes, reset_peak
from mergemill.engine import make_plan
from mergemill.engine.runs.tasks.gates import compute_gates
from mergemill.engine.runs.worker.process import set_up_process
from mergemill.engine.runs.worker.workplace import Workplace
from pathlib import Path
job = make_plan(Path("moe.json")).gates
with set_up_process():
    least = job.arena_bytes + job.leaf_bytes
    leafwise = compute_gates(job, Workplace(least, 1))  # loads transformers
    promised = job.arena_bytes + job.layer_bytes
    _, before = reset_peak()
    whole = compute_gates(job, Workplace(promised, 1))
    print(json.dumps([least, promised, peak_bytes(os.getpid()) - before, whole == leafwise]))
"""


def test_the_pass_keeps_its_promise_and_reads_leaf_by_leaf_where_it_must(tmp_path: Path) -> None:
    big = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    write_dense(tmp_path / "llama-a", "llama", seed=0, **big)
    recipe = say(tmp_path, "llama", "hidden", "a", "a")
    recipe["experts"][1]["positive_prompts"] = PROMPTS["b"][0]
    (tmp_path / "moe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        check=True,
    )
    least, promised, peak, same = json.loads(done.stdout.splitlines()[-1])
    layer = 4 * sum(value.numel() for name, value in read_tensors(tmp_path / "llama-a").items() if ".layers.3." in name)
    assert same
    assert least < promised
    assert layer < promised < 2.5 * layer
    assert peak < promised + MALLOC_BYTES < 10 * layer
    job = make_plan(recipe).gates
    assert job is not None
    with pytest.raises(errors.PlanError, match=r"the gates of \d+ prompts need \d+ bytes"):
        job.check_memory(least - 1)


def test_hidden_states_are_those_of_the_whole_model_bit_for_bit(models: Path) -> None:
    import transformers

    folder = models / "llama-b"
    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    batches = [torch.tensor([[5, 6, 7], [9, 10, 200]]), torch.tensor([[4, 4, 8, 12, 90]])]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for leafwise in (False, True):
        seen: dict[tuple[int, int], torch.Tensor] = {}

        def see(found: LayerSeen, seen: dict[tuple[int, int], torch.Tensor] = seen) -> None:
            seen[found.layer, found.batch] = found.inputs.clone()

        weights = ModelWeights(lambda name, out: out.copy_(tensors[name]), lambda name, rows: tensors[name][rows])
        run_layers(config, weights, batches, see, Pass("end", leafwise))
        for number, batch in enumerate(batches):
            with torch.no_grad():
                states = model(batch, output_hidden_states=True).hidden_states
            assert all(torch.equal(seen[layer, number], each) for layer, each in enumerate(states))


def test_prompts_of_one_length_go_together() -> None:
    prompts = [[0] * length for length in (3, 1, 3, 3, 2)]
    assert group_lengths(prompts, 6) == [[1], [4], [0, 2], [3]]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "equal prompts": ({"experts": "bb"}, "the prompts are equal for all experts"),
    "too long": ({"prompt": "x y " * 60}, r"has \d+ tokens, and .*llama-a takes 64 \(max_position_embeddings\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prompts_that_make_no_gates_are_refused(case: str, models: Path, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    recipe = say(models, "llama", "hidden", *changes.get("experts", "bc"))
    if "prompt" in changes:
        recipe["experts"][0]["positive_prompts"] = [changes["prompt"]]
    with pytest.raises(errors.PlanError, match=words):
        run(make_plan(recipe), tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_tokenizer_that_knows_the_prompts_is_refused(models: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    write_dense(tmp_path / "llama-a", "llama", seed=0)
    recipe = {**say(models, "llama", "hidden"), "base_model": str(tmp_path / "llama-a")}
    Tokenizer(WordLevel({"<unk>": 0, "songs": 1}, "<unk>")).save(str(tmp_path / "llama-a" / "tokenizer.json"))
    with pytest.raises(errors.PlanError, match="knows no token of the prompt 'a poem of the sea'"):
        make_plan(recipe)
    (tmp_path / "llama-a" / "tokenizer.json").unlink()
    with pytest.raises(errors.PlanError, match=r"llama-a has no tokenizer\.json, by which prompts become tokens"):
        make_plan(recipe)


def test_the_plan_says_what_gates_take(models: Path) -> None:
    numbers = describe_plan(make_plan(say(models, "llama", "hidden")), workers=0)
    assert numbers["gates"]["prompts"] == 5
    assert numbers["gates"]["mode"] == "hidden"
    assert 0 < numbers["gates"]["least_bytes"] <= numbers["gates"]["worker_bytes"] < PART_BYTES


def test_a_page_draws_what_the_router_does_with_its_prompts(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vl_convert")
    recipe = tmp_path / "moe.yml"
    recipe.write_text(json.dumps(say(models, "llama", "hidden", experts_per_token=1)))
    command = ["merge", str(recipe), str(tmp_path / "out"), "--workers", "0", "--report", str(tmp_path / "page.html")]
    assert execute(command) == 0
    told = capsys.readouterr().err
    assert "of the prompts, in one layer" in told
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg ") == 4
    assert "prompt 1, of 0" in page
    assert "<script" not in page
    assert execute(command) == 2
    assert "was finished before; its card has what its router does" in capsys.readouterr().err
    drawn = [{"source_model": f"{models}/llama-b"}] * 2
    recipe.write_text(json.dumps({**say(models, "llama", "random"), "experts": drawn}))
    assert execute([*command[:2], str(tmp_path / "drawn"), *command[3:]]) == 2
    assert "shows a router that is made from prompts, and this is of the kind mixture" in capsys.readouterr().err
