"""Workers and drivers write to the output and to the cache, and nowhere else; no name leads out of the output."""

import dataclasses
import json
from pathlib import Path

import pytest
from clusters import start_cluster
from runs.buckets import found_by_environment, put_family
from runs.merging import list_files, plan_merge, run_until
from servers.s3 import S3

from mergemill.engine import abort, run
from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.record import check_names

OURS = ("dask-scratch-space", "log", "scheduler.json")  # of Dask itself, in its local directory


def take_snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all that lies in folders, but for Dask's own."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.relative_to(folder).parts[0] not in OURS:
                status = path.lstat()
                found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("source", ["disk", "s3"])
def test_workers_write_to_the_output_and_the_cache_alone(
    source: str, family: Path, moto_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / name for name in ("home", "temporary", "work", "driver")}
    for place in places.values():
        place.mkdir()
    environ = {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "XDG_CACHE_HOME": ""}
    cache, out = tmp_path / "cache", tmp_path / "out"
    with found_by_environment(moto_server):
        models = family if source == "disk" else put_family(moto_server, family).url
        monkeypatch.chdir(places["driver"])
        with start_cluster(places["work"], environ=environ) as cluster:
            plan = plan_merge("ties", models)
            before = take_snapshot(*places.values(), family)
            run(plan, out, scheduler=cluster.address, memory="64MiB", cache="1GB", cache_folder=cache)
            assert take_snapshot(*places.values(), family) == before
    assert (out / "model.safetensors.index.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} - {*places} == {"out", "cache"}


def test_a_snapshot_shows_what_is_written(tmp_path: Path) -> None:
    before = take_snapshot(tmp_path)
    (tmp_path / "left").write_text("x")
    assert take_snapshot(tmp_path) != before


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/../../b", "..", "", "."])
def test_names_that_lead_out_of_the_output_are_refused(name: str) -> None:
    with pytest.raises(OutputError, match="would be written outside of the output"):
        check_names(["model.safetensors", name], "out")


def rename(plan: Plan, name: str, *, shard: bool) -> Plan:
    """Return the plan with another name for its first shard, or its first small file."""
    if shard:
        first = dataclasses.replace(plan.shards[0], name=name)
        return dataclasses.replace(plan, shards=(first, *plan.shards[1:]))
    return dataclasses.replace(plan, files=(dataclasses.replace(plan.files[0], name=name), *plan.files[1:]))


@pytest.mark.parametrize("shard", [True, False], ids=["a shard", "a small file"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "above"])
def test_a_plan_that_leads_out_of_the_output_is_refused_before_anything_is_written(
    shard: bool, absolute: bool, family: Path, tmp_path: Path
) -> None:
    name = str(tmp_path / "elsewhere") if absolute else "../elsewhere"
    with pytest.raises(OutputError) as error:
        run(rename(plan_merge("linear", family), name, shard=shard), tmp_path / "out", workers=0)
    assert str(error.value) == f"{tmp_path / 'out'}: {name!r} would be written outside of the output"
    assert list(tmp_path.iterdir()) == []


def test_an_abort_removes_nothing_outside_of_the_output(family: Path, tmp_path: Path) -> None:
    """Even where somebody else wrote the record beside an unfinished merge."""
    out = tmp_path / "out"
    run_until(plan_merge("linear", family), out, parts=2)
    record = out / ".mergemill" / "plan.json"
    said = json.loads(record.read_text())
    said["files"] = {f"../{name}": sum_ for name, sum_ in said["files"].items()}
    record.write_text(json.dumps(said))
    (tmp_path / "config.json").write_bytes((family / "A" / "config.json").read_bytes())
    outside = {name: data for name, data in list_files(tmp_path).items() if not name.startswith("out/")}
    abort(out)  # the plan counts as damaged: what is mergemill's own goes, and nothing that it names
    assert {name: data for name, data in list_files(tmp_path).items() if not name.startswith("out/")} == outside
    assert outside.keys() == {"config.json"}
