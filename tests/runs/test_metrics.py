"""Prometheus metrics of ours, served by Dask's workers: they say what the receipts say."""

import importlib.util
import os
import re
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Foreign, start_cluster
from distributed import Client
from runs.buckets import found_by_environment, new_place, put_family
from runs.merging import plan_merge
from servers import faults
from servers.proxy import start_proxy
from servers.s3 import S3

from mergemill.engine import run
from mergemill.engine.runs.events import PartFinished
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.worker import metrics
from mergemill.engine.runs.worker.workplace import Counts, Workplace
from mergemill.engine.storage import tries
from mergemill.engine.storage.tries import count_retries

if importlib.util.find_spec("prometheus_client") is None and not os.environ.get("CI"):
    pytest.skip("prometheus_client is not installed: pip install mergemill[metrics]", allow_module_level=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    """Two workers over TCP."""
    with start_cluster(tmp_path_factory.mktemp("cluster"), "--dashboard-address", "127.0.0.1:0") as started:
        yield started


def parse_metrics(text: str) -> dict[str, float]:
    """Return the values of our metrics, by name."""
    return {name: float(value) for name, value in re.findall(r"^(mergemill_\w+) (\S+)$", text, re.MULTILINE)}


def ask_workers(cluster: Foreign) -> Counter[str]:
    """Return our metrics, added up over what each worker answers to GET /metrics."""
    total = Counter[str]()
    with Client(cluster.address, set_as_default=False) as client:
        for worker in client.scheduler_info(n_workers=-1)["workers"].values():
            url = f"http://{worker['host']}:{worker['services']['dashboard']}/metrics"
            with urllib.request.urlopen(url, timeout=30) as answer:
                for name, value in parse_metrics(answer.read().decode()).items():
                    total[name] += value  # type: ignore[assignment]
    return total


def sum_up(receipts: list[Receipt]) -> tuple[int, int, int]:
    """Return the bytes read, the bytes written and the parts of receipts."""
    written_bytes = sum(receipt.stop_bytes - receipt.start_bytes for receipt in receipts)
    return sum(receipt.read_bytes for receipt in receipts), written_bytes, len(receipts)


def of_tasks(found: Counter[str]) -> tuple[float, float, float]:
    """Return the same of metrics."""
    return (
        found["mergemill_read_bytes_total"],
        found["mergemill_written_bytes_total"],
        found["mergemill_parts_total"],
    )


def test_workers_serve_what_the_receipts_say_over_several_merges(
    cluster: Foreign, family: Path, tmp_path: Path
) -> None:
    receipts: list[Receipt] = []
    for name in ("first", "second"):
        run(plan_merge("linear", family), tmp_path / name, scheduler=cluster.address, memory="64MiB")
        receipts += FolderOutput(tmp_path / name).journal.read()
        found = ask_workers(cluster)
        assert of_tasks(found) == sum_up(receipts)
    assert len(receipts) > 40
    assert found["mergemill_memory_promised_bytes"] == found["mergemill_memory_lent_bytes"] == 0
    before = found["mergemill_read_bytes_total"]
    run(plan_merge("ties", family), tmp_path / "ties", scheduler=cluster.address, memory="64MiB")
    told = sum_up(list(FolderOutput(tmp_path / "ties").journal.read()))
    assert ask_workers(cluster)["mergemill_read_bytes_total"] - before > told[0], "statistics are read as well"


def test_what_a_merge_holds_is_seen_while_it_runs(cluster: Foreign, family: Path, tmp_path: Path) -> None:
    seen: list[Counter[str]] = []

    def look(event: Any) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            seen.append(ask_workers(cluster))

    run(plan_merge("linear", family), tmp_path / "out", scheduler=cluster.address, memory="64MiB", on_event=look)
    assert seen[0]["mergemill_memory_promised_bytes"] == 2 * 64 << 20
    assert seen[0]["mergemill_parts_total"] >= 3
    assert {name for name in seen[0] if "_created" not in name} == {
        "mergemill_read_bytes_total",
        "mergemill_written_bytes_total",
        "mergemill_parts_total",
        "mergemill_gate_waiting_seconds_total",
        "mergemill_retries_total",
        "mergemill_gate_waiting",
        "mergemill_memory_lent_bytes",
        "mergemill_memory_promised_bytes",
    }


def test_the_wait_for_memory_is_counted() -> None:
    workplace = Workplace(4 << 20, threads=2)
    with workplace.lend(1 << 20):
        assert workplace.lent_bytes == 1 << 20
    first_s = workplace.counts.waited_s
    assert 0 <= first_s < 0.2
    wait_behind(workplace, 0.3)
    assert 0.25 < workplace.counts.waited_s - first_s < 5
    assert (workplace.lent_bytes, workplace.waiting) == (0, 0)


def wait_behind(workplace: Workplace, seconds: float) -> None:
    """Let a task wait for what another holds."""

    def borrow() -> None:
        with workplace.lend(4 << 20):
            pass

    with workplace.lend(4 << 20):
        waiting = threading.Thread(target=borrow)
        waiting.start()
        waiting.join(seconds)
        assert workplace.waiting == 1
    waiting.join()


def test_runs_of_one_process_add_up_and_are_registered_once() -> None:
    before = read_own()
    for parts in (2, 3):
        workplace = Workplace(1 << 20, threads=1)
        with metrics.metered(workplace), metrics.metered(other := Workplace(2 << 20, threads=1)):
            workplace.count(Counts(10, 20, parts))
            other.count(Counts(1, 2, 1))
            assert read_own()["mergemill_memory_promised_bytes"] == 3 << 20
    after = read_own()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["mergemill_read_bytes_total"] == 22
    assert grown["mergemill_written_bytes_total"] == 44
    assert grown["mergemill_parts_total"] == 7
    assert grown["mergemill_memory_promised_bytes"] == 0


def read_own() -> dict[str, float]:
    """Return our metrics of this process."""
    import prometheus_client

    return parse_metrics(prometheus_client.generate_latest().decode())


@pytest.mark.parametrize("library", [True, False], ids=["with the library", "without"])
def test_a_merge_needs_no_prometheus(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
    workplace = Workplace(1 << 20, threads=1)
    with metrics.metered(workplace):
        workplace.count(Counts(parts=1))
    assert workplace.counts.parts == 1


@pytest.mark.parametrize("fault", ["a lost answer", "a refused part", "refused listings"])
def test_retries_of_storage_are_counted(
    fault: str, seaweed_server: S3, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.001)
    refuse = faults.refuse(503, "SlowDown")
    rules: dict[str, Callable[..., Any]] = {
        "a lost answer": faults.at_first(2, faults.lose_answer(), "get"),
        "a refused part": faults.at_first(2, refuse, "part"),
        "refused listings": faults.at_first(2, refuse, "list"),
    }
    with start_proxy(seaweed_server.url) as proxy, found_by_environment(seaweed_server.through(proxy.url)):
        plan = plan_merge("linear", put_family(seaweed_server, family).url, part_bytes=5 << 20, shard_size="700KB")
        before = count_retries()
        proxy.rule = rules[fault]
        run(plan, new_place(seaweed_server).url, workers=0, threads=1)
    assert count_retries() - before >= 2
