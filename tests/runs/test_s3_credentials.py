"""Keys stay where the AWS tools look for them: nothing that a merge writes, sends or says holds one, or a signature."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from clusters import start_cluster
from distributed import Client
from runs import dumping
from runs.buckets import found_by_environment, new_place, put_family
from runs.merging import list_files, make_recipe, plan_merge, slow_down
from servers import faults
from servers.faults import Rule
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import run
from mergemill.engine.runs import running
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.storage import tries

KEY, SECRET, TOKEN = (
    "AKIADISTINCTIVEKEY01",
    "distinctive/Secret+of40characters/abcdefg",
    "distinctiveToken//////////wEaDGFi",
)
SIGNS = ("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "Signature=", "AWS4-HMAC")


class Search:
    """Looks for what must not be found, in whatever it is shown."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = (*secrets, *SIGNS)
        self.shown_bytes = 0

    def __call__(self, where: str, data: bytes | str) -> None:
        """Fail where a key is found."""
        text = data if isinstance(data, str) else data.decode("latin-1")
        assert [secret for secret in self._secrets if secret in text] == [], where
        self.shown_bytes += len(text)

    def all(self, files: Mapping[str, bytes]) -> None:
        """Look at files, and at their names."""
        assert files
        for name, data in files.items():
            self(name, name)
            self(name, data)


@pytest.fixture
def temporary(moto_server: S3) -> Iterator[Search]:
    """Temporary credentials of moto, which takes any."""
    given = S3(moto_server.url, KEY, SECRET)
    with found_by_environment(given, AWS_SESSION_TOKEN=TOKEN):
        yield Search(KEY, SECRET, TOKEN)


@pytest.fixture
def proxy(seaweed_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What merges of this process take for S3; who tries again does not wait."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.001)
    with start_proxy(seaweed_server.url) as running, found_by_environment(seaweed_server.through(running.url)):
        yield running


@pytest.mark.parametrize(("source", "target"), [("disk", "s3"), ("s3", "disk"), ("s3", "s3")])
def test_what_is_written_sent_and_said_holds_no_keys(
    source: str,
    target: str,
    temporary: Search,
    moto_server: S3,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = str(family) if source == "disk" else put_family(moto_server, family).url
    place = new_place(moto_server)
    out = place.url if target == "s3" else str(tmp_path / "out")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(make_recipe("ties", models).text)
    list_written: Callable[[], Mapping[str, bytes]] = (
        place.read if target == "s3" else lambda: list_files(tmp_path / "out")
    )
    make_tasks = running.make_tasks

    def look(plan: Any, *arguments: Any, **options: Any) -> Any:
        """What goes to workers, and what lies there while they work."""
        tasks = make_tasks(plan, *arguments, **options)
        temporary("tasks", cloudpickle.dumps([dict(task.dask) for task in tasks]))
        temporary("tasks, as Dask shows them", repr([dict(task.dask) for task in tasks]))
        temporary("plan", pickle.dumps(plan))
        temporary("plan, shown", repr(plan))
        temporary.all(list_written())
        return tasks

    monkeypatch.setattr(running, "make_tasks", look)
    monkeypatch.setenv("MERGEMILL_DEBUG", "1")
    for command in (
        ["plan", recipe],
        ["plan", recipe, "--json"],
        ["merge", recipe, out, "--shard-size", "700KB", "--json"],
        ["merge", recipe, out, "--shard-size", "700KB"],
        ["verify", out, "--json"],
        ["inspect", out],
    ):
        assert execute([str(word) for word in command]) == 0
        printed = capsys.readouterr()
        temporary(f"{command[0]} says", printed.out + printed.err)
    temporary.all(list_written())
    assert temporary.shown_bytes > 3_000_000


def test_what_a_cluster_shows_and_logs_holds_no_keys(
    temporary: Search, moto_server: S3, family: Path, tmp_path: Path
) -> None:
    """Graph, task stream, state, dashboard, metrics, events and logs, of scheduler and workers."""
    out = new_place(moto_server)
    plan = plan_merge("ties", put_family(moto_server, family).url, part_bytes=5 << 20, shard_size="700KB")
    looks = []
    with (
        start_cluster(tmp_path, "--dashboard-address", "127.0.0.1:0") as cluster,
        Client(cluster.address, set_as_default=False) as client,
    ):
        client.get_task_stream()  # from here on it is kept
        client.run(slow_down, 0.1)  # so that tasks are left when the first is done

        def look(event: Event) -> None:
            if isinstance(event, PartFinished) and event.parts_done in (1, len(plan.parts)):
                looks.append(event.parts_done)
                shown = dumping.dump_cluster(client)
                assert '"bytes"' in shown["/json/counts.json"]
                assert "tcp://" in shown["/info/main/workers.html"]
                assert "mergemill_parts_total" in shown["/metrics"]
                assert out.url in shown["tasks"] or event.parts_done > 1  # or the tasks were not seen
                for where, text in shown.items():
                    temporary(where, text)

        run(plan, out.url, scheduler=cluster.address, memory="128MiB", on_event=look)
        for where, text in dumping.dump_cluster(client).items():
            temporary(where, text)
    assert looks == [1, len(plan.parts)]
    temporary("what all processes print", (tmp_path / "log").read_bytes())
    temporary.all(out.read())


def test_an_unfinished_merge_holds_no_keys(temporary: Search, moto_server: S3, family: Path) -> None:
    out = new_place(moto_server)
    plan = plan_merge("linear", put_family(moto_server, family).url, part_bytes=5 << 20, shard_size="700KB")

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            temporary.all(out.read())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, out.url, workers=0, threads=2, on_event=stop)
    left = out.read()
    assert {".mergemill/plan.json", ".mergemill/uploads.json"} < left.keys()
    temporary.all(left)


REFUSED = faults.refuse(403, "AccessDenied")
STORM = faults.refuse(500, "InternalError")
FAILURES: Mapping[str, Rule] = {
    "all is refused": lambda request: REFUSED,
    "models cannot be read": lambda request: REFUSED if request.path.endswith("model.safetensors") else None,
    "parts are refused": faults.at_first(1 << 30, REFUSED, "part"),
    "files are refused": faults.at_first(1 << 30, REFUSED, "put"),
    "addresses run out": lambda request: faults.expire() if request.path.endswith("model.safetensors") else None,
    "a storm": lambda request: STORM,
    "a storm while models are read": lambda request: STORM if request.path.endswith("model.safetensors") else None,
    "a storm at parts": faults.at_first(1 << 30, STORM, "part"),
    "a storm at the end": faults.at_first(1 << 30, STORM, "complete"),
    "no answers to reads": lambda request: faults.lose_answer() if request.path.endswith("model.safetensors") else None,
    "no answers to parts": faults.at_first(1 << 30, faults.lose_answer(), "part"),
    "another version": lambda request: faults.change_etag() if request.kind == "get" else None,
}


def test_a_key_would_be_found(temporary: Search) -> None:
    for found in (KEY, f"…{SECRET}…", TOKEN.encode(), b"\xff?X-Amz-Signature=0"):
        with pytest.raises(AssertionError):
            temporary("here", found)


@pytest.mark.parametrize("failure", [*FAILURES, "a wrong secret", "a server that is gone"])
def test_errors_hold_no_keys(
    failure: str,
    proxy: Proxy,
    seaweed_server: S3,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor do their tracebacks, with all that led to them, nor what libraries log."""
    search = Search(seaweed_server.access_key, seaweed_server.secret_key, "guessedSecret")
    out, recipe = new_place(seaweed_server), tmp_path / "recipe.yml"
    recipe.write_text(make_recipe("linear", put_family(seaweed_server, family).url).text)
    proxy.rule = FAILURES.get(failure, faults.never)
    if failure == "a wrong secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessedSecret")
    if failure == "a server that is gone":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MERGEMILL_DEBUG", "1")
    assert execute(["merge", str(recipe), out.url, "--json"]) in (1, 2)
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert '"event": "error"' in printed.out
    search("errors", printed.out + printed.err)
    search("logs", caplog.text)
    if out.sizes():
        search.all(out.read())
