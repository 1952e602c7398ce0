"""Runs of the page: processes of their own, known by their outputs, whatever becomes of the page."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hubs import use_hub
from models import read_tensors
from page.conftest import Ask
from servers.hub import Hub

from mergemill.cli.page import jobs, shelf
from mergemill.cli.page.jobs import Errand, make_words
from mergemill.cli.page.results import list_uses
from mergemill.cli.page.runs import OutputWatch
from mergemill.cli.page.settings import Setup, parse_chosen
from mergemill.engine.errors import InputError, StorageError

RECIPE = """\
merge_method: task_arithmetic
base_model: models/base
models: [{model: models/a, parameters: {weight: 0.5}}]
"""


class Caller:
    """Asks a page that is a process."""

    def __init__(self, address: str) -> None:
        self.url, _, token = address.partition("/#token=")
        self._more: Any = {"headers": {"authorization": f"Bearer {token}"}, "timeout": 30}

    def ask(self, path: str, **given: Any) -> Any:
        return httpx.get(f"{self.url}/api/{path}", params=given, **self._more).json()

    def order(self, path: str, **given: Any) -> Any:
        return httpx.post(f"{self.url}/api/{path}", json=given, **self._more).json()

    def wait(self, name: str) -> Any:
        """Return a run once it has ended."""
        end_s = time.monotonic() + 60
        while (run := self.ask("run", id=name))["live"]:
            assert time.monotonic() < end_s, run
            time.sleep(0.2)
        return run


def test_a_killed_page_loses_no_run_and_the_next_shows_it_with_its_report(
    start_page: Callable[..., Any], root: Path
) -> None:
    page, address = start_page(root)
    first = Caller(address)
    name = first.order("merge", text=RECIPE, out="outlived", report=True, memory="512MiB", seed="3")["id"]
    compared = first.order("compare", first="models/a", second="models/b", base="models/base")["id"]
    assert "a merge is there already" in first.order("merge", text=RECIPE, out="./outlived")["message"]
    page.kill()
    page.wait()

    second = Caller(start_page(root)[1])
    assert {name, compared} <= {run["id"] for run in second.ask("runs")}
    run = second.wait(name)
    assert (run["state"], run["error"], run["recipe"], run["report"]) == ("finished", "", RECIPE, True)
    assert "--memory 512MiB --seed 3" in run["log"]
    assert dict(run["facts"])["seed"] == "3"
    assert run["committed"]["changed"]
    assert read_tensors(root / "outlived").keys() == read_tensors(root / "models" / "a").keys()
    result = second.ask("result", id=name)
    assert "# " in result["card"]
    assert "model.safetensors.index.json" in dict(result["files"])
    shown = httpx.get(second.url + second.order("show", id=name)["address"], timeout=30)
    assert "What task_arithmetic changed" in shown.text
    assert second.wait(compared)["report"]
    assert "already" in second.order("merge", text=RECIPE, out="outlived")["message"]


def test_what_fails_says_why_and_can_be_taken_off_the_list(ask: Ask, root: Path) -> None:
    job = Errand(jobs.PUSH, "nowhere", words=("org/name",))
    jobs.start_other(Setup(root), job.kind, job.out, job.words)
    end_s = time.monotonic() + 60
    while (run := ask("GET", "/api/run", params={"id": job.name}).json())["live"]:
        assert time.monotonic() < end_s
        time.sleep(0.1)
    assert run["state"] == "failed"
    assert run["error"].startswith("nowhere: ")
    assert ask("POST", "/api/abort", json={"id": job.name}).json() == {}
    assert ask("GET", "/api/run", params={"id": job.name}).status_code == 400


def test_words_of_a_run_are_those_of_its_command(root: Path) -> None:
    setup = Setup(root, methods=("/my.py",), scheduler="tcp://s:1")
    chosen = {"workers": 0, "shard_size": "tensor"}
    merge = Errand(jobs.MERGE, "out", chosen, report=True)
    place = f"{jobs.FOLDER}/{merge.name}"
    assert make_words(merge, setup) == [
        *("merge", f"{place}/recipe.yml", "out", "--shard-size", "tensor", "--workers", "0"),
        *("--methods", "/my.py", "--scheduler", "tcp://s:1", "--report", f"{place}/report.html"),
    ]
    assert make_words(Errand(jobs.PUSH, "out", words=("a/b", "--public")), setup) == ["push", "out", "a/b", "--public"]
    compared = make_words(Errand(jobs.COMPARE, "a", words=("a", "b", "c")), setup)
    assert compared[:7] == ["diff", "a", "b", "--base", "c", "--scheduler", "tcp://s:1"]


def test_looking_takes_a_fiftieth_of_a_core_at_most(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = 0.0, 0

    def look(out: str) -> None:
        nonlocal now, looks
        looks += 1
        now += 0.5  # as of a journal of very many parts

    monkeypatch.setattr("mergemill.cli.page.runs._read_status", look)
    watch = OutputWatch(clock=lambda: now)
    for _ in range(1000):
        watch.look("out")
        now += 0.1
    assert looks == 5  # each half a second, in 100 s


def test_a_search_is_among_the_runs_with_its_plots(ask: Ask, root: Path) -> None:
    folder = root / "found"
    folder.mkdir()
    for name in shelf.SEARCH:
        (folder / name).write_text("<svg></svg>")
    (run,) = [each for each in ask("GET", "/api/runs").json() if each["kind"] == "search"]
    assert (run["title"], run["state"]) == ("found", "finished")
    shown = ask("GET", ask("POST", "/api/show", json={"id": run["id"]}).json()["address"])
    assert shown.text == "<svg></svg>"


def test_ways_to_use_a_merge_fit_its_place() -> None:
    assert [use["title"] for use in list_uses("s3://bucket/out")] == ["Check it", "Publish it"]
    assert 'name = "org/name"' in list_uses("hf://org/name")[0]["text"]
    assert list_uses("/a b")[1]["text"] == "vllm serve '/a b'"


@pytest.mark.parametrize("given", [{"memory": "much"}, {"workers": "two"}, {"threads": 0}, {"seed": -1}])
def test_a_choice_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        parse_chosen(given)


def test_the_hub_is_searched_and_where_it_is_not_reached_that_is_told(hub: Hub, tmp_path: Path) -> None:
    for name in ("org/chat", "org/code"):
        hub.add_repo(name)
    with use_hub(hub, tmp_path) as start:
        assert shelf.search_hub("chat") == [{"path": "org/chat", "kind": "model"}]
        start("http://127.0.0.1:9")
        with pytest.raises(StorageError, match=r"the Hub is not reached \(\w+\)"):
            shelf.search_hub("chat")
