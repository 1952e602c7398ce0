"""Stages: merges over the results of merges, which are written nowhere, against running them one after the other."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import read_tensors
from reference.mergekit import Job, MergekitError, find_skip_reason, run_mergekit_batch
from runs.merging import SMALL_PART, hash_output, parts_of, run_until, same_tensors

from mergemill.cli.main import execute
from mergemill.engine import errors, make_plan, merge, run, verify
from mergemill.engine.plan.values import Plan
from mergemill.engine.tensors.merged import Merged, Merging
from mergemill.engine.tensors.slabs import Span

Document = dict[str, Any]
KINDS = {
    "element": ("task_arithmetic", {"weight": 0.7}, {}),
    "sums": ("dare_ties", {"weight": 0.6, "density": 0.5}, {}),
    "gram": ("model_stock", {}, {}),
    "rank": ("ties", {"weight": 0.6, "density": 0.4}, {}),
    "row": ("della", {"weight": 0.6, "density": 0.5, "epsilon": 0.1}, {}),
    "matrix": ("iso_c", {}, {}),
}


def merging(kind: str, *models: str, **more: Any) -> Document:
    """Return a document of a kind of method over models and the base."""
    method, own, shared = KINDS[kind]
    entries = [{"model": model, "parameters": dict(own)} for model in models]
    return {"merge_method": method, "base_model": "base", "models": entries, "parameters": shared, **more}


def average(*models: str, **more: Any) -> Document:
    entries = [{"model": model, "parameters": {"weight": 1 + i / 3}} for i, model in enumerate(models)]
    return {"merge_method": "linear", "models": entries, **more}


def write(documents: Sequence[Document]) -> str:
    return "---\n".join(json.dumps(document, indent=1) + "\n" for document in documents)


def plan_stages(documents: Sequence[Document], **options: Any) -> Plan:
    with parts_of(SMALL_PART):
        return make_plan(write(documents), **options)


def place(value: Any, made: Mapping[str, str]) -> Any:
    """Return a part of a document with folders for the names of models."""
    if isinstance(value, Mapping):
        return {key: item if key == "name" else place(item, made) for key, item in value.items()}
    if isinstance(value, list):
        return [place(item, made) for item in value]
    return made.get(value, value) if isinstance(value, str) else value


def merge_apart(documents: Sequence[Document], folder: Path) -> Path:
    """Merge one document after the other, each by itself into a folder of its name; return the last's."""
    made: dict[str, str] = {}
    out = folder
    for i, document in enumerate(documents):
        name = document.get("name", f"result{i}")
        out = folder / name
        run(plan_stages([{**place(document, made), **({"name": name} if "name" in document else {})}]), out, workers=0)
        made[name] = str(out)
    return out


@pytest.fixture(autouse=True)
def _in_the_family(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)


@pytest.mark.parametrize(("inner", "outer"), list(zip(KINDS, [*list(KINDS)[1:], *list(KINDS)[:1]], strict=True)))
def test_rounded_stages_have_the_bytes_of_merges_one_after_the_other(inner: str, outer: str, tmp_path: Path) -> None:
    documents = [merging(inner, "A", "B", name="inner"), merging(outer, "inner", "B")]
    run(plan_stages(documents, round_stages=True), tmp_path / "out", workers=0)
    assert same_tensors(tmp_path / "out", merge_apart(documents, tmp_path / "apart"))


FIVE = [
    average("A", "B", name="mean"),
    merging("rank", "mean", "A", name="trimmed"),
    {
        "name": "stack",
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "mean", "layer_range": [0, 2]}]},
            {"sources": [{"model": "trimmed", "layer_range": [1, 2]}]},
        ],
    },
    {
        "name": "taller",
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "A", "layer_range": [0, 2]}]},
            {"sources": [{"model": "B", "layer_range": [1, 2]}]},
        ],
    },
    {
        "merge_method": "slerp",
        "base_model": "stack",
        "models": [{"model": "stack"}, {"model": "taller"}],
        "parameters": {"t": [0.2, 0.8]},
    },
]


@pytest.mark.parametrize("workers", [0, 2])
def test_five_stages_with_slices_and_a_stage_over_two_have_the_bytes_of_one_after_the_other(
    workers: int, tmp_path: Path
) -> None:
    plan = plan_stages(FIVE, round_stages=True)
    run(plan, tmp_path / "out", workers=workers)
    assert same_tensors(tmp_path / "out", merge_apart(FIVE, tmp_path / "apart"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    with parts_of(SMALL_PART):
        verify(tmp_path / "out", replay=len(plan.parts))


@pytest.mark.parametrize("kind", ["element", "rank", "matrix"])
def test_the_common_stage_of_a_diamond_is_read_and_computed_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(common: str, name: str, model: str) -> Document:
        return merging("element", common, model, name=name)

    common, result = merging(kind, "A", "B", name="common"), merging("element", "left", "right")
    apart = [common, {**common, "name": "again"}, over("common", "left", "A"), over("again", "right", "B"), result]
    run(plan_stages(apart), tmp_path / "apart", workers=0)
    made: list[tuple[Merged, Span]] = []  # which hold what was made, so that no two have one id
    for name in ("slab", "lower"):
        monkeypatch.setattr(Merging, name, _count(getattr(Merging, name), made))
    plan = plan_stages([common, over("common", "left", "A"), over("common", "right", "B"), result])
    found = run(plan, tmp_path / "out", workers=0)
    assert same_tensors(tmp_path / "out", tmp_path / "apart")
    assert found.read_bytes == plan.read_bytes
    assert 2.9 * plan.write_bytes < plan.read_bytes < 3 * plan.write_bytes  # of three models, each once
    counts = collections.Counter((id(merged), span) for merged, span in made)
    assert set(counts.values()) == {1}


def _count(method: Callable[..., Any], made: list[tuple[Merged, Span]]) -> Callable[..., Any]:
    """Return a method of what is ready that notes of which tensor it makes a slab, and which."""

    def counting(self: Merging, span: Span, work: Any, *given: Any) -> Any:
        made.append((self.merged, span))
        return method(self, span, work, *given)

    return counting


def test_without_rounding_a_result_is_nearer_to_the_formula(family: Path, tmp_path: Path) -> None:
    documents = [average("A", "B", name="mean"), average("mean", "B", name="again"), average("again", "A")]
    weights = torch.tensor([1.0, 4 / 3], dtype=torch.float64) / (1 + 4 / 3)
    a, b = ({name: x.double() for name, x in read_tensors(family / model).items()} for model in "AB")
    exact = {}
    for name in a:
        mean = weights[0] * a[name] + weights[1] * b[name]
        again = weights[0] * mean + weights[1] * b[name]
        exact[name] = weights[0] * again + weights[1] * a[name]
    far = {}
    for rounded in (False, True):
        out = tmp_path / f"rounded-{rounded}"
        run(plan_stages(documents, round_stages=rounded), out, workers=0)
        far[rounded] = measure(exact, read_tensors(out))
    best = measure(exact, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()})
    assert far[False] < 1.0001 * best
    assert far[True] > 1.1 * best


def measure(exact: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    """Return the sum of the squared errors."""
    return sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)


def test_nothing_but_the_result_is_written_also_where_it_is_resumed(tmp_path: Path) -> None:
    plan = plan_stages(FIVE)
    run(plan, tmp_path / "whole", workers=0)
    run_until(plan, tmp_path / "out", 3)
    resumed = run(plan, tmp_path / "out", workers=2)
    assert resumed.redone_parts <= resumed.parts - 3
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_model_that_is_thinned_in_two_stages_gets_two_masks(tmp_path: Path) -> None:
    thin = [{**merging("sums", "A", name=name), "dtype": "float32"} for name in ("one", "two")]
    apart = {"merge_method": "task_arithmetic", "base_model": "one", "models": [{"model": "two"}], "dtype": "float32"}
    apart["parameters"] = {"weight": 1.0}
    plan = plan_stages([*thin, apart])
    run(plan, tmp_path / "two", workers=0)
    run(plan_stages([thin[0], average("one", dtype="float32")]), tmp_path / "one", workers=0)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0.2 < float((one[name] != two[name]).double().mean()) < 0.8  # density 0.5: half of the masks' bits differ


def test_the_plan_tells_what_each_stage_reads_and_the_card_names_models_alone(tmp_path: Path) -> None:
    plan = plan_stages(FIVE)
    assert [use.model for use in plan.sources if use.is_stage] == [
        "trimmed: mean",
        "stack: mean",
        "stack: trimmed",
        "stack",
        "taller",
    ]
    assert all(use.read_bytes == 0 for use in plan.sources if use.is_stage)
    run(plan, tmp_path / "out", workers=0)
    card = (tmp_path / "out" / "README.md").read_text()
    listed = card.split("## Models\n")[1].split("##")[0].split()
    assert listed == ["*", "`A`", "*", "`B`", "*", "`base`"]


def refuse(*documents: Document) -> str:
    with pytest.raises(errors.InputError) as caught:
        plan_stages(documents)
    return str(caught.value)


def test_what_a_stage_cannot_be_is_refused_with_its_name() -> None:
    guarded = refuse(average("A", "B", name="mean", guard={"policy": "fail"}), average("mean", "A"))
    assert guarded.startswith("recipe: stage mean: a guard looks at what is written")
    scaled = refuse(merging("element", "A", "B", name="s", coefficients={"method": "metagpt"}), average("s", "A"))
    assert scaled.startswith("recipe: stage s: metagpt needs the norms of all task vectors first")
    misspelt = refuse(merging("rank", "A", name="s") | {"parameters": {"lamda": 1}}, average("s", "A"))
    assert misspelt.startswith("recipe: stage s: ")
    assert "takes no parameter 'lamda'; did you mean 'lambda'?" in misspelt
    assert "nowhere: no such file or folder" in refuse(average("A", name="s"), average("nowhere", "s"))
    assert refuse(average("A", "B", name="mean"), average("mean", "mena")).endswith("did you mean the stage 'mean'?")
    tall = [{"sources": [{"model": "mean", "layer_range": [0, 3]}]}]
    assert "[0, 3]" in refuse(average("A", "B", name="mean"), {"merge_method": "passthrough", "slices": tall})


def test_a_stage_that_nothing_needs_and_one_that_hides_a_folder_are_told() -> None:
    warnings = plan_stages([average("A", name="other"), average("base", name="B"), average("A", "B")]).warnings
    assert "recipe: nothing needs the stage other, which is not merged" in warnings
    assert "recipe: B is the stage, not the folder of that name, which is ./B" in warnings


@pytest.mark.skipif(find_skip_reason() is not None, reason=str(find_skip_reason()))
def test_a_file_of_mergekit_multi_gives_what_it_gives(family: Path, tmp_path: Path) -> None:
    documents = [
        average("A", "B", name="mean", dtype="float32"),
        merging("element", "mean", "A", name="added", dtype="float32"),
        {**average("added", "mean", "base"), "dtype": "float32"},
    ]
    run(plan_stages(documents), tmp_path / "ours", workers=0)
    made = {model: str(family / model) for model in ("A", "B", "base")}
    jobs = []
    for i, document in enumerate(documents):
        jobs.append(Job(yaml.safe_dump(place(document, made)), tmp_path / f"theirs{i}"))
        made[document.get("name", "")] = str(jobs[-1].folder)
    theirs, ours = run_mergekit_batch(jobs)[-1], read_tensors(tmp_path / "ours")
    assert not isinstance(theirs, MergekitError)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 5e-6


def test_a_stage_is_written_too_where_it_is_kept(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [
        average("A", "B", name="mean"),
        merging("sums", "mean", "A", name="thin"),
        merging("rank", "thin", "B"),
    ]
    run(plan_stages(documents), tmp_path / "plain", workers=0)
    kept = [{**documents[0], "keep": str(tmp_path / "elsewhere")}, *documents[1:]]
    (tmp_path / "recipe.yml").write_text(write(kept))
    command = ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--workers", "0"]
    assert execute([*command, "--keep-stages", str(tmp_path / "stages")]) == 0
    told = capsys.readouterr().err
    assert f"recipe.yml: mean is merged into {tmp_path}/elsewhere first" in told
    assert same_tensors(tmp_path / "out", tmp_path / "plain"), "a result does not hang on what is kept"
    run(plan_stages(documents[:1]), tmp_path / "mean", workers=0)
    run(plan_stages(documents[:2]), tmp_path / "thin", workers=0)
    assert same_tensors(tmp_path / "elsewhere", tmp_path / "mean")
    assert same_tensors(tmp_path / "stages" / "thin", tmp_path / "thin")
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["thin"]
    assert verify(tmp_path / "stages" / "thin", replay=1).replayed == 1
    assert execute([*command, "--keep-stages", str(tmp_path / "stages")]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_what_is_kept_is_a_stage_and_each_in_a_place_of_its_own(tmp_path: Path) -> None:
    mean = average("A", "B", name="mean", keep="x")
    with pytest.raises(errors.RecipeError, match="keep is for a stage, which nothing else writes; where the result"):
        make_plan(write([average("A", "B", keep="x")]))
    with pytest.raises(errors.RecipeError, match="the stages mean and more are both kept in x"):
        make_plan(write([mean, average("A", "B", name="more", keep="x"), average("mean", "more")]))
    (tmp_path / "link").symlink_to(tmp_path)
    for keep, why in [("./x", "both kept in"), (f"{tmp_path}/link/x/y", "is kept in .*, which lies in")]:
        first = {**mean, "keep": f"{tmp_path}/x"} if "link" in keep else mean
        with pytest.raises(errors.RecipeError, match=why):
            make_plan(write([first, average("A", "B", name="more", keep=keep), average("mean", "more")]))


def list_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_no_kept_stage_is_written_over_the_result_or_over_what_any_of_them_reads(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    made, link = tmp_path / "made", tmp_path / "link"
    run(plan_stages([average("A", "B")]), made, workers=0)
    link.symlink_to(made)
    before = list_times(tmp_path)

    def refuse(keep: str, out: str, *more: str, why: str, reads: str = "B") -> None:
        stages = [average("B", "A", name="s", **({"keep": keep} if keep else {})), average("s", reads)]
        (tmp_path / "recipe.yml").write_text(write(stages))
        given = [str(tmp_path / "recipe.yml"), f"{tmp_path}/{out}", "--workers", "0", *more, *flags]
        for command in (["merge", "-q"], ["plan"]):
            assert execute([*command, *given]) == 2
            assert why in capsys.readouterr().err
        (tmp_path / "recipe.yml").unlink()
        assert list_times(tmp_path) == before

    source = "is a source of this merge" if flags else "that one is finished"
    for place in (f"{made}", f"{link}", f"{made}/../made", f"file://{made}"):
        refuse(place, "out", why=source, reads=str(made))
    refuse(f"local://{made}", "out", why=source, reads=str(made))
    refuse(str(made), "out", why=source, reads=f"local://{made}")
    refuse(f"{tmp_path}/./out", "out", why="a stage and another merge would both be written there")
    refuse("", "out/s", "--keep-stages", f"{tmp_path}/out", why="would both be written there")
    refuse(f"{tmp_path}/out", "out/res", why="lies in")
    if not flags:
        refuse(f"{tmp_path}/stage", "made", why="that one is finished")
    recipe = write([average("B", "A", name="s", keep=f"{made}"), average("s", str(made))])
    with pytest.raises(errors.OutputError, match=source):
        merge(recipe, tmp_path / "out", workers=0, overwrite=bool(flags))
    assert list_times(tmp_path) == before
