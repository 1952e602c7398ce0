"""Runs of the page: processes of their own, known by their outputs, whatever becomes of the page."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
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
from mergemill.cli.page.runs import OutputWatch, _check_link
from mergemill.cli.page.settings import Setup, parse_chosen
from mergemill.engine.errors import InputError, OutputError, StorageError

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
        *("merge", "--shard-size", "tensor", "--workers", "0", "--methods", "/my.py", "--scheduler", "tcp://s:1"),
        *("--report", f"{place}/report.html", "--", f"{place}/recipe.yml", "out"),
    ]
    pushed = make_words(Errand(jobs.PUSH, "-out", words=("a/b", "--public")), setup)
    assert pushed == ["push", "--public", "--", "-out", "a/b"]
    compared = make_words(Errand(jobs.COMPARE, "a", words=("a", "b", "c")), setup)
    assert compared[:5] == ["diff", "--base", "c", "--scheduler", "tcp://s:1"]
    assert compared[-3:] == ["--", "a", "b"]


def test_one_place_has_one_run_however_many_ask_at_once(ask: Ask, root: Path) -> None:
    body = {"text": RECIPE, "out": "raced", "memory": "512MiB"}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask("POST", "/api/merge", json=body), range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400]
    name = jobs.make_name(jobs.MERGE, "raced")
    assert (log := jobs.read_log(root, name)).count("$ mergemill merge") == 1, log
    job = jobs.read_job(root, name)
    assert job
    with jobs.hold_starts(root), pytest.raises(InputError, match="it runs already"):
        jobs.start_merge(Setup(root), RECIPE, "raced", parse_chosen({}), report=False)  # as of another page
    jobs.end(job)
    while jobs.is_alive(job):
        time.sleep(0.1)


def test_notes_that_are_links_are_neither_read_nor_written(ask: Ask, root: Path) -> None:
    job = Errand(jobs.PUSH, "linked-notes", words=("org/name",))
    folder, hidden = root / jobs.FOLDER / job.name, root.parent / "hidden.txt"
    folder.mkdir(parents=True)
    hidden.write_text("a secret")
    (folder / jobs.NOTE).write_text(json.dumps(asdict(job)))
    for name in (jobs.LOG, jobs.RECIPE):
        (folder / name).symlink_to(hidden)
    run = ask("GET", "/api/run", params={"id": job.name}).json()
    assert (run["log"], run["recipe"]) == ("", "")
    with pytest.raises(OutputError, match="symbolic link"):
        jobs.resume(Setup(root), job)
    assert hidden.read_text() == "a secret"
    jobs.forget(root, job.name)
    folder.symlink_to(root.parent)
    assert ask("GET", "/api/run", params={"id": job.name}).status_code == 400
    folder.unlink()


def test_only_addresses_of_the_web_are_links() -> None:
    assert _check_link("http://127.0.0.1:8787/status") == "http://127.0.0.1:8787/status"
    assert [_check_link(given) for given in ("javascript:alert(1)", "data:text/html,x", "", None, 5)] == [""] * 5


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
