"""What a plan says it will move to and from object storage is what a merge moves."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from plan.sketches import config, llama, write_sketch
from runs.buckets import found_by_environment, new_place, put_family
from runs.merging import BODIES, Killed, make_recipe_of, parts_of
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import describe_plan, make_plan, run
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.runs.events import Event, PartFinished

MIB = 1 << 20


@pytest.fixture
def proxy(moto_server: S3) -> Iterator[Proxy]:
    with start_proxy(moto_server.url) as running, found_by_environment(moto_server.through(running.url)):
        yield running


def plan_from(place: str, method: str, part_bytes: int = MIB) -> Plan:
    body = BODIES[method]
    for name in ("base", "A", "B"):
        body = body.replace(f"{{{name}}}", f"{place}/{name}")
    with parts_of(part_bytes):
        return make_plan(parse_recipe(f"merge_method: {method}{body}"))


def find_traffic(plan: Plan, *, memory: str = "512MiB", out: str | None = None) -> dict[str, dict[str, Any]]:
    found = describe_plan(plan, memory=memory, workers=0, threads=2, out=out)
    return {each["scheme"]: each for each in found["remote"]}


def count_reads(proxy: Proxy, work: Callable[[], object]) -> tuple[int, int]:
    """Return bytes of weights that were read meanwhile, and by how many requests."""
    before = len(proxy.journal.exchanges)
    work()
    made = [
        each
        for each in proxy.journal.exchanges[before:]
        if each.request.kind == "get" and each.request.path.endswith(".safetensors")
    ]
    return sum(each.sent_bytes for each in made), len(made)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "passthrough"])
def test_what_is_read_once_is_as_planned(
    method: str, proxy: Proxy, moto_server: S3, family: Path, tmp_path: Path
) -> None:
    plan = plan_from(put_family(moto_server, family).url, method)
    traffic = find_traffic(plan)["s3"]
    read = count_reads(proxy, lambda: run(plan, tmp_path / "out", workers=0, threads=2, memory="512MiB"))
    assert (traffic["read_bytes"], traffic["most_read_bytes"]) == (read[0], read[0])
    assert traffic["read_requests"] == traffic["most_read_requests"]
    assert read[1] == pytest.approx(traffic["read_requests"], rel=0.1)


@pytest.mark.parametrize(("memory", "kept"), [("512MiB", True), ("64MiB", False)])
def test_what_is_read_in_several_passes_lies_between_once_and_all_of_them(
    memory: str, kept: bool, proxy: Proxy, moto_server: S3, family: Path, tmp_path: Path
) -> None:
    plan = plan_from(put_family(moto_server, family).url, "ties", 32 * MIB if kept else 1 << 17)
    traffic = find_traffic(plan, memory=memory)["s3"]
    read, _ = count_reads(proxy, lambda: run(plan, tmp_path / "out", workers=0, threads=2, memory=memory))
    assert traffic["read_bytes"] == plan.read_bytes
    assert traffic["read_bytes"] <= read <= traffic["most_read_bytes"]
    assert (traffic["read_bytes"] == traffic["most_read_bytes"]) == kept


def test_uploads_are_counted(proxy: Proxy, moto_server: S3, family: Path) -> None:
    plan, place = plan_from(str(family), "linear", 5 * MIB), new_place(moto_server)
    traffic = find_traffic(plan, out=place.url)["s3"]
    assert (traffic["read_bytes"], traffic["read_requests"]) == (0, 0)
    assert traffic["write_bytes"] == plan.write_bytes
    run(plan, place.url, workers=0, threads=2)
    made = proxy.journal.count()
    assert traffic["write_requests"] == made["part"] + made["create"] + made["complete"] + len(plan.files)


def test_what_the_server_copies_is_not_read(moto_server: S3, tmp_path: Path, proxy: Proxy) -> None:
    write_llama(tmp_path / "family" / "A", vocab=24_000, hidden=256, intermediate=256, layers=1, seed=1)
    url = put_family(moto_server, tmp_path / "family").url
    plan = make_plan(make_recipe_of({"merge_method": "passthrough", "models": [{"model": f"{url}/A"}]}))
    there, here = (find_traffic(plan, out=out)["s3"]["read_bytes"] for out in ("s3://models/copy", str(tmp_path)))
    assert (there, here) == (0, plan.read_bytes)


def test_norms_of_whole_models_are_one_pass_more(proxy: Proxy, moto_server: S3, family: Path) -> None:
    url = put_family(moto_server, family).url
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": f"{url}/base",
        "models": [{"model": f"{url}/A", "parameters": {"weight": 1}}],
        "coefficients": {"method": "metagpt"},
    }
    traffic = find_traffic(make_plan(make_recipe_of(recipe)))["s3"]
    assert traffic["most_read_bytes"] == 2 * traffic["read_bytes"]


def test_local_merges_move_nothing(family: Path, tmp_path: Path) -> None:
    assert find_traffic(plan_from(str(family), "linear"), out=str(tmp_path)) == {}


def test_writes_to_any_storage_are_counted(family: Path) -> None:
    plan = plan_from(str(family), "linear")
    assert find_traffic(plan, out="memory://out")["memory"]["write_bytes"] == plan.write_bytes


# --- the command ---


@pytest.fixture
def recipe(proxy: Proxy, moto_server: S3, tmp_path: Path) -> Path:
    """A recipe for a small model in S3."""
    folder = write_sketch(tmp_path / "large", llama(layers=2), config=config(layers=2))
    url = put_family(moto_server, folder.parent).url
    path = tmp_path / "recipe.yml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {url}/large, parameters: {{weight: 1}}}}]\n")
    return path


def test_the_plan_says_it_to_people(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plan", str(recipe), "s3://models/new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  s3 ")] == [
        next(line for line in lines if " read in about " in line),
        next(line for line in lines if " written in about " in line),
    ]
    assert not [line for line in lines if "$" in line or "cost" in line]  # nobody can keep prices true


def end_with_a_part(event: Event) -> None:
    """End as if killed once a part is there."""
    if isinstance(event, PartFinished):
        raise Killed


def test_what_was_aborted_says_how_much_it_was(
    proxy: Proxy, moto_server: S3, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = new_place(moto_server)
    with suppress(Killed):
        run(plan_from(str(family), "linear", 5 * MIB), place.url, workers=0, threads=1, on_event=end_with_a_part)
    assert execute(["abort", place.url]) == 0
    said = capsys.readouterr().out
    assert said.endswith("MiB freed\n")
