"""compose.yaml: by the specification's own schema, and its example run on a real cluster and a real SeaweedFS."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import start_cluster
from deployments import DEPLOY, check_command, is_refused, iter_commands, read_yaml, run_program
from servers import seaweed
from servers.s3 import S3

from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.runs.clusters.preflight import SPARE_BYTES

PATH = DEPLOY / "compose" / "compose.yaml"
SERVICES: dict[str, Any] = read_yaml(PATH)[0]["services"]


def check(path: Path) -> subprocess.CompletedProcess[str]:
    return run_program("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_the_file_is_a_compose_file() -> None:
    done = check(PATH)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("healthcheck:", "healthchek:"), ("retries: 12", "retries: [12]"), ("command: [worker", "command: {a: 1} #")],
)
def test_the_schema_finds_a_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    text = PATH.read_text()
    assert right in text
    (tmp_path / "compose.yaml").write_text(text.replace(right, wrong, 1))
    assert check(tmp_path / "compose.yaml").returncode == 1


def test_services_start_what_the_image_has() -> None:
    worker = check_command(SERVICES["worker"]["command"])
    assert worker["scheduler"] == "tcp://scheduler:8786"
    assert check_command(SERVICES["scheduler"]["command"])["dashboard_address"] == ":8787"
    words = [word.replace("--nthreads", "--nthread") for word in SERVICES["worker"]["command"]]
    assert is_refused(words)


def test_the_worker_may_hold_what_is_promised_and_what_python_takes() -> None:
    promised_bytes = parse_size("1GiB", what="--memory")
    assert '"1GiB"' in (PATH.parent / "example.py").read_text()
    limit = check_command(SERVICES["worker"]["command"])["memory_limit"]
    assert parse_size(limit, what="--memory-limit") == promised_bytes + SPARE_BYTES
    assert SERVICES["worker"]["deploy"]["resources"]["limits"]["memory"] == "2G"  # which Docker takes as 2 GiB


def test_containers_are_healthy_only_when_they_answer_and_write_nowhere() -> None:
    for name in ("scheduler", "worker", "storage"):
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    for name in ("scheduler", "worker", "merge"):
        assert (SERVICES[name]["read_only"], SERVICES[name]["cap_drop"]) == (True, ["ALL"])
    waits = SERVICES["merge"]["depends_on"]
    assert {name: wait["condition"] for name, wait in waits.items()} == dict.fromkeys(
        ("scheduler", "worker", "storage"), "service_healthy"
    )


def test_no_secret_is_written_down() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert "KEY" not in name or value.startswith(f"${{{name}:?"), name


def test_the_scheduler_has_no_key_and_nothing_is_reached_from_elsewhere() -> None:
    assert SERVICES["scheduler"]["environment"] == {}
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"scheduler": ["127.0.0.1:8787:8787"], "storage": ["127.0.0.1:8333:8333"]}


@pytest.mark.parametrize("service", ["scheduler", "worker"])
def test_health_is_asked_where_the_dashboard_is(service: str) -> None:
    command, probe = SERVICES[service]["command"], SERVICES[service]["healthcheck"]["test"]
    port = command[command.index("--dashboard-address") + 1]
    assert f"127.0.0.1{port}/health" in probe[-1]
    assert probe[1] == "python"


def test_storage_answers_the_question_for_its_health(seaweed_server: S3) -> None:
    assert "/healthz" in SERVICES["storage"]["healthcheck"]["test"][-1]
    with urllib.request.urlopen(f"{seaweed_server.url}/healthz", timeout=10) as answer:
        assert answer.status == 200


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """SeaweedFS with the settings of the file, but for places and ports."""
    if (reason := seaweed.find_skip_reason()) and not os.environ.get("CI"):
        pytest.skip(reason)
    service = SERVICES["storage"]
    given = [word for word in service["command"][1:] if not word.startswith(("-dir", "-ip", "-s3.port"))]
    ours = [word for word in seaweed.SETTINGS if not word.startswith(("-volume", "-master.volume"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seaweed, "SETTINGS", (*ours, *given))
        for name, value in service["environment"].items():
            patch.setenv(name, value) if name.startswith("WEED") else None
        with seaweed.start_seaweed(tmp_path_factory.mktemp("storage")) as server:
            yield server


def test_storage_has_room_for_many_buckets(storage: S3) -> None:
    client = storage.connect()
    for number in range(10):  # with weed's own settings there are volumes for two
        client.create_bucket(Bucket=f"bucket-{number}")
        client.put_object(Bucket=f"bucket-{number}", Key="key", Body=b"?")


def test_models_are_put_as_its_head_says(storage: S3, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (code,) = re.findall(r'python -c "(.*)"$', PATH.read_text(), re.MULTILINE)
    command = [sys.executable, "-c", code.replace("/models/", f"{tmp_path}/")]
    subprocess.run(command, env={**os.environ, **storage.make_environ()}, check=True, timeout=60)
    found = storage.connect().list_objects_v2(Bucket="mine")["Contents"]
    assert [each["Key"] for each in found] == ["base/config.json"]


def test_the_commands_in_its_head_are_commands_of_mergemill() -> None:
    text = PATH.read_text().replace("merge \\\n#     merge /recipe.yml", "\n# mergemill merge /recipe.yml")
    (words,) = iter_commands(text)
    assert check_command(words)["scheduler"] == "tcp://scheduler:8786"


def test_the_example_merges_from_bucket_to_bucket(seaweed_server: S3, tmp_path: Path) -> None:
    environ = seaweed_server.make_environ() | {"AWS_PROFILE": "", "AWS_SESSION_TOKEN": ""}
    environ = {name: value for name, value in environ.items() if value}
    folder = tmp_path / "cluster"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with start_cluster(folder, environ=environ) as cluster:
        done = subprocess.run(
            [sys.executable, PATH.parent / "example.py", "s3://example", cluster.address],
            env={**os.environ, **environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    client = seaweed_server.connect()
    names = {each["Key"] for each in client.list_objects_v2(Bucket="example", Prefix="merged/")["Contents"]}
    assert "merged/model.safetensors.index.json" in names
