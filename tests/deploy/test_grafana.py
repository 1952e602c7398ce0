"""The dashboard and the scrape example: every metric in them is one that a scheduler or a worker really serves."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import start_cluster
from deployments import DEPLOY, need_module, read_yaml
from distributed import Client
from runs.merging import plan_merge, write_family

from mergemill.engine import run
from mergemill.engine.runs.events import PartFinished

DASHBOARD = json.loads((DEPLOY / "grafana" / "mergemill.json").read_text())
SCRAPE: dict[str, Any] = read_yaml(DEPLOY / "grafana" / "prometheus.yml")[0]
NEEDED = {
    "mergemill_read_bytes_total",
    "mergemill_written_bytes_total",
    "mergemill_parts_total",
    "mergemill_gate_waiting_seconds_total",
    "mergemill_gate_waiting",
    "mergemill_retries_total",
    "mergemill_memory_lent_bytes",
    "mergemill_memory_promised_bytes",
    "dask_worker_memory_bytes",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What a scheduler and a worker serve during a merge: the labels of each metric, by name."""
    need_module("prometheus_client", "prometheus_client")
    folder = tmp_path_factory.mktemp("served")
    write_family(folder / "models", layers=1)
    texts: list[str] = []
    with start_cluster(folder, "--dashboard-address", "127.0.0.1:0", count=1) as cluster:

        def look(event: Any) -> None:
            if isinstance(event, PartFinished) and event.parts_done == 3:
                texts.extend(ask(url) for url in list_urls(cluster.address))

        plan = plan_merge("linear", folder / "models")
        run(plan, folder / "out", scheduler=cluster.address, memory="64MiB", on_event=look)
    return parse_names("\n".join(texts))


def list_urls(address: str) -> Iterator[str]:
    """Yield where a cluster's scheduler and workers serve metrics."""
    with Client(address, set_as_default=False) as client:
        info = client.scheduler_info(n_workers=-1)
    yield f"http://127.0.0.1:{info['services']['dashboard']}/metrics"
    for worker in info["workers"].values():
        yield f"http://127.0.0.1:{worker['services']['dashboard']}/metrics"


def ask(url: str) -> str:
    """Return what is served there."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def parse_names(text: str) -> dict[str, set[str]]:
    """Return the labels of each metric in what Prometheus is served."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([a-zA-Z_:]\w*)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def iter_targets() -> Iterator[tuple[str, str]]:
    """Yield expression and legend of each line of the dashboard."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


def find_names(expression: str) -> set[str]:
    """Return the metrics of an expression."""
    return set(re.findall(r"\b(?:dask|mergemill)_\w+", expression))


def find_unserved(expressions: list[str], served: dict[str, set[str]]) -> set[str]:
    """Return the metrics that nobody serves."""
    return {name for expression in expressions for name in find_names(expression)} - served.keys()


def test_every_metric_of_the_dashboard_is_served(served: dict[str, set[str]]) -> None:
    expressions = [expression for expression, _ in iter_targets()]
    assert find_unserved(expressions, served) == set()
    assert {name for expression in expressions for name in find_names(expression)} >= NEEDED
    assert all(find_names(expression) for expression in expressions)


def test_a_metric_that_nobody_serves_is_found(served: dict[str, set[str]]) -> None:
    expressions = ["sum(rate(mergemill_bytes_read_total[1m]))", "dask_worker_memory"]
    assert find_unserved(expressions, served) == {"mergemill_bytes_read_total", "dask_worker_memory"}


def test_every_label_of_a_legend_is_one_of_its_metric(served: dict[str, set[str]]) -> None:
    for expression, legend in iter_targets():
        for label in set(re.findall(r"\{\{(\w+)\}\}", legend)) - {"instance"}:  # which Prometheus adds
            assert all(label in served[name] for name in find_names(expression)), (expression, label)


def test_panels_are_laid_out_beside_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    source = DASHBOARD["templating"]["list"][0]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    for panel in panels:
        assert panel["datasource"]["uid"] == f"${{{source['name']}}}"


def test_prometheus_asks_the_services_of_compose_on_the_ports_of_their_dashboards() -> None:
    services = read_yaml(DEPLOY / "compose" / "compose.yaml")[0]["services"]
    ports = {name: find_port(services[name]["command"]) for name in ("scheduler", "worker")}
    assert set(SCRAPE) == {"global", "scrape_configs"}
    scheduler, worker = SCRAPE["scrape_configs"]
    assert scheduler["static_configs"] == [{"targets": [f"scheduler:{ports['scheduler']}"]}]
    assert worker["dns_sd_configs"] == [{"names": ["worker"], "type": "A", "port": ports["worker"]}]


def find_port(command: list[str]) -> int:
    """Return the port of a dashboard in a command line."""
    return int(command[command.index("--dashboard-address") + 1].removeprefix(":"))


def test_every_file_of_deploy_is_looked_at_by_a_test() -> None:
    """One that is added needs a check of its own."""
    looked = {
        "README.md",
        "compose/compose.yaml",
        "compose/example.py",
        "conda/meta.yaml",
        "dask/mergemill.yaml",
        "docker/Dockerfile",
        "docker/Dockerfile.cuda",
        "docker/entrypoint.sh",
        "docs/build.py",
        "grafana/mergemill.json",
        "grafana/prometheus.yml",
        "release/finish.py",
        "slurm/driver.sh",
        "slurm/jobqueue.yaml",
        "space/Dockerfile",
        "space/README.md",
        "space/start.sh",
        "tls/make_certificates.sh",
    }
    files = [path for path in Path(DEPLOY).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found = {str(path.relative_to(DEPLOY)) for path in files}
    assert {name for name in found if not name.startswith(("helm/", "kubernetes/"))} == looked
