"""Merges that keep what they read: a second one asks the server for nothing, and every byte is the same."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from runs.merging import BODIES, hash_output, parts_of
from runs.test_refusals import mounted
from servers.fixtures import BUCKET
from servers.hub import Hub
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.engine import make_plan, run
from mergemill.engine.errors import InputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.runs import caching
from mergemill.engine.runs.events import Committed
from mergemill.engine.storage.cache import file_bytes
from mergemill.engine.storage.ranges import close_all

LIMIT = "64MiB"
PART = 1 << 20


@pytest.fixture(scope="module")
def family_url(moto_server: S3, family: Path) -> str:
    """Where the models of the family lie on the server."""
    client = moto_server.connect()
    for path in sorted(family.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"cached/{path.relative_to(family)}", Body=path.read_bytes())
    client.close()
    return f"s3://{BUCKET}/cached"


@pytest.fixture
def proxy(moto_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands before the server that the environment names."""
    with start_proxy(moto_server.url) as running:
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in moto_server.through(running.url).make_environ().items():
            monkeypatch.setenv(name, value)
        close_all()
        yield running
    close_all()


def plan_from(place: str, method: str, *, part_bytes: int = PART, more: str = "") -> Plan:
    body = BODIES[method]
    for name in ("base", "A", "B"):
        body = body.replace(f"{{{name}}}", f"{place}/{name}")
    with parts_of(part_bytes):
        return make_plan(parse_recipe(f"merge_method: {method}{body}{more}"))


def merge(plan: Plan, out: Path, folder: Path | None, **options: object) -> Committed:
    kept = {} if folder is None else {"cache": LIMIT, "cache_folder": folder}
    return run(plan, out, **{"workers": 0, "threads": 2, "memory": "256MiB", **kept, **options})  # type: ignore[arg-type]


def count_reads(proxy: Proxy, work: Callable[[], object]) -> int:
    """Return how many bytes of weights the server sent meanwhile."""
    before = len(proxy.journal.exchanges)
    work()
    found = [each for each in proxy.journal.exchanges[before:] if each.request.path.endswith(".safetensors")]
    return sum(each.sent_bytes for each in found if each.request.method == "GET")


def weights_of(plan: Plan) -> int:
    return sum(source.read_bytes for source in plan.sources)


def without_recipe(out: Path) -> dict[str, str]:
    """Return what does not name the models' places."""
    return {name: value for name, value in hash_output(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_merge_with_other_settings_reads_nothing_from_the_server(
    family_url: str, family: Path, proxy: Proxy, tmp_path: Path, workers: int
) -> None:
    first, cache = plan_from(family_url, "ties"), tmp_path / "cache"
    options = {"workers": workers, "threads": 2 if not workers else 1}
    read = count_reads(proxy, lambda: merge(first, tmp_path / "first", cache, **options))
    assert read == weights_of(first)  # of its several passes over the inputs, the others read what the first has kept
    for method, part_bytes, memory in (("dare_linear", 2 << 20, "512MiB"), ("task_arithmetic", 1 << 18, "64MiB")):
        plan = plan_from(family_url, method, part_bytes=part_bytes)
        out = tmp_path / method
        assert count_reads(proxy, lambda p=plan, o=out, m=memory: merge(p, o, cache, **options, memory=m)) == 0
        merge(plan_from(str(family), method, part_bytes=part_bytes), tmp_path / f"{method}-here", None)
        assert without_recipe(out) == without_recipe(tmp_path / f"{method}-here")


def test_without_being_asked_nothing_is_kept(
    family_url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    plan = plan_from(family_url, "linear")
    assert count_reads(proxy, lambda: merge(plan, tmp_path / "a", None)) == weights_of(plan)
    assert count_reads(proxy, lambda: merge(plan, tmp_path / "b", None)) == weights_of(plan)
    assert not (tmp_path / "caches").exists()


def test_by_default_it_is_where_caches_are(
    family_url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    merge(plan_from(family_url, "linear"), tmp_path / "out", None, cache=LIMIT)
    assert [path.name for path in (tmp_path / "caches").iterdir()] == ["mergemill"]
    assert list((tmp_path / "caches" / "mergemill").rglob("*-*"))


def test_local_models_are_not_kept(family: Path, tmp_path: Path) -> None:
    merge(plan_from(str(family), "linear"), tmp_path / "out", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*-*"))


def test_damage_is_mended_from_the_server(family_url: str, proxy: Proxy, tmp_path: Path) -> None:
    plan, cache = plan_from(family_url, "linear"), tmp_path / "cache"
    merge(plan, tmp_path / "first", cache)
    entries = sorted(path for path in cache.rglob("*-*") if path.is_file())
    spoiled = 0
    for entry in entries[::3]:
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 0x10
        entry.write_bytes(data)
        start, stop = map(int, entry.name.split("-"))
        spoiled += stop - start
    assert count_reads(proxy, lambda: merge(plan, tmp_path / "second", cache)) == spoiled
    assert hash_output(tmp_path / "first") == hash_output(tmp_path / "second")
    assert count_reads(proxy, lambda: merge(plan, tmp_path / "third", cache)) == 0


def test_a_cache_too_small_for_the_models_stays_within_its_size(
    family_url: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "LEAST_BYTES", 1)
    plan, cache = plan_from(family_url, "ties"), tmp_path / "cache"
    limit = weights_of(plan) // 3
    for name in ("first", "second"):
        merge(plan, tmp_path / name, cache, cache=limit)
        kept = [path.stat() for path in cache.rglob("*-*") if path.is_file()]
        assert 0 < sum(found.st_blocks * 512 for found in kept) <= limit
    assert hash_output(tmp_path / "first") == hash_output(tmp_path / "second")


MERGE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from runs.test_cache import merge, plan_from
merge(plan_from({url!r}, sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_two_merges_at_once_share_a_cache(family_url: str, family: Path, proxy: Proxy, tmp_path: Path) -> None:
    program = MERGE.format(tests=str(Path(__file__).parents[1]), url=family_url)
    methods = ("ties", "linear")
    merges = [
        subprocess.Popen([sys.executable, "-c", program, method, str(tmp_path / method), str(tmp_path / "cache")])
        for method in methods
    ]
    assert [each.wait() for each in merges] == [0, 0]
    for method in methods:
        merge(plan_from(str(family), method), tmp_path / f"{method}-here", None)
        assert without_recipe(tmp_path / method) == without_recipe(tmp_path / f"{method}-here")
    plan = plan_from(family_url, "dare_ties")
    assert count_reads(proxy, lambda: merge(plan, tmp_path / "out", tmp_path / "cache")) == 0


def fill_up(disk: Path) -> None:
    """Leave no byte free."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_means_no_cache_and_not_a_failed_merge(
    family_url: str, family: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_from(family_url, "linear")
    merge(plan_from(str(family), "linear"), tmp_path / "here", None)
    with mounted(tmp_path / "disk", "size=2m") as disk:
        merge(plan, tmp_path / "spared", disk / "cache")
        assert not list(disk.rglob("*-*"))  # a disk with less than a GiB left is left alone
        monkeypatch.setattr(caching, "SPARE_BYTES", 0)
        merge(plan, tmp_path / "full", disk / "cache")
        kept = [path for path in disk.rglob("*-*") if path.is_file()]
        assert 0 < sum(path.stat().st_size for path in kept) < 2 << 20
        for path in kept:
            start, stop = map(int, path.name.split("-"))
            assert path.stat().st_size == file_bytes(stop - start)
        fill_up(disk)
        merge(plan, tmp_path / "fuller", disk / "cache")
    for name in ("spared", "full", "fuller"):
        assert without_recipe(tmp_path / name) == without_recipe(tmp_path / "here")


def test_the_cache_leaves_the_output_its_room(family: Path, tmp_path: Path) -> None:
    """On the disk of the output, what the merge will write stays free; on another, what every disk is left."""
    beside = caching.choose_cache(LIMIT, tmp_path / "cache", tmp_path / "new" / "out", 1000, here=True)
    assert beside is not None
    assert beside.spare_bytes == caching.SPARE_BYTES + 1000
    elsewhere = caching.choose_cache(LIMIT, tmp_path / "cache", "s3://bucket/out", 1000, here=True)
    assert elsewhere is not None
    assert elsewhere.spare_bytes == caching.SPARE_BYTES


def test_on_a_cluster_each_host_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "drivers"))
    options = caching.choose_cache(LIMIT, None, "out", 1000, here=False)
    assert options is not None
    assert options.folder is None
    assert not (tmp_path / "drivers").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "workers"))
    assert options.find_folder() == tmp_path / "workers" / "mergemill"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "5"}, r"^--cache 5: 5 bytes hold next to nothing, 64\.0 MiB are the least; .* such as 50GB$"),
        ({"cache": "lots"}, r"^--cache: 'lots' is not a size; write bytes, or a number with MB, GB, MiB or GiB$"),
        ({"cache_folder": "x"}, r"^--cache-folder is of no use without --cache SIZE; .*$"),
        ({"cache": LIMIT, "cache_folder": "/dev/null/x"}, r"^/dev/null/x: no cache can be there: .*$"),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(
    family: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        merge(plan_from(str(family), "linear"), tmp_path / "out", None, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_said_at_once(family: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(InputError, match="ermission denied"):
        merge(plan_from(str(family), "linear"), tmp_path / "out", tmp_path / "cache")


def test_of_the_hub_what_its_own_cache_lacks_is_kept(hub: Hub, family: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from hubs import use_hub
    from huggingface_hub import snapshot_download

    for name in ("A", "B"):
        hub.add_repo(f"org/{name}", {path.name: path for path in (family / name).iterdir()})
    with use_hub(hub, tmp_path / "home"):
        snapshot_download("org/B", endpoint=hub.url, token=False)
        merge(plan_from("hf://org", "linear"), tmp_path / "first", tmp_path / "cache")
        kept = sum(int(stop) - int(start) for start, stop in (each.name.split("-") for each in entries(tmp_path)))
        assert kept == weights_of(plan_from(str(family), "linear")) / 2
        plan, before = plan_from("hf://org", "linear"), hub.journal.count()
        merge(plan, tmp_path / "second", tmp_path / "cache")
        assert before["cdn"] > (hub.journal.count() - before)["cdn"] == 0
    assert hash_output(tmp_path / "first") == hash_output(tmp_path / "second")


def entries(folder: Path) -> list[Path]:
    """Return the ranges that the cache in a folder keeps."""
    return [path for path in (folder / "cache").rglob("*-*") if path.is_file()]
