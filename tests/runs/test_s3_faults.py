"""Merges from and to S3 through a proxy that makes faults: the same bytes, or one error that names the cause."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import Place, found_by_environment, new_place, put_family
from runs.merging import hash_output, make_recipe_of, parts_of, plan_merge, write_family
from servers import faults
from servers.asked import Request
from servers.faults import Fault, Rule
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.engine import abort, make_plan, run
from mergemill.engine.errors import MergemillError, OutputError, SourceChanged, StorageError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, Event, PartFinished
from mergemill.engine.storage import tries
from mergemill.engine.storage.ranges import pin_file, read_into

OFTEN = 7  # attempts: more than boto3 makes by itself, fewer than it makes in all
ALWAYS = 1 << 30
WRITES = ("create", "part", "complete", "put", "list_parts", "list", "list_uploads", "delete")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 1 MB, whose merge is five shards of a part each. Not to be changed."""
    return write_family(tmp_path_factory.mktemp("models"), vocab=800, hidden=128, layers=1)


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, str]:
    """The hashes of a merge without faults, from disk to disk."""
    run_here(plan_of(models), models / "merged")
    return hash_output(models / "merged")


@pytest.fixture
def proxy(seaweed_server: S3, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What merges of this process take for S3; it begins without faults. Who tries again does not wait."""
    put_family(seaweed_server, models)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.001)
    with start_proxy(seaweed_server.url) as running, found_by_environment(seaweed_server.through(running.url)):
        yield running


@pytest.fixture
def source(seaweed_server: S3, models: Path) -> str:
    """The URL of the models."""
    return put_family(seaweed_server, models).url


@pytest.fixture
def out(seaweed_server: S3) -> Place:
    """Where nothing is yet, looked at past the proxy."""
    return new_place(seaweed_server)


def plan_of(models: Path | str) -> Plan:
    return plan_merge("linear", models, part_bytes=5 << 20, shard_size="250KB")


def run_here(plan: Plan, out: Path | str, **options: Any) -> Committed:
    return run(plan, out, workers=0, threads=2, **options)


def only(fault: Fault, *kinds: str, attempts: int = ALWAYS) -> Rule:
    return faults.at_first(attempts, fault, *kinds)


def of_weights(rule: Rule) -> Rule:
    """The rule, for what is read of models alone."""
    return lambda request: rule(request) if request.path.endswith("/model.safetensors") else None


def after_the_start(rule: Rule) -> Rule:
    """The rule once the output is held; what is asked before that has boto3's patience alone: four more attempts."""
    held: list[Request] = []

    def choose(request: Request) -> Fault | None:
        if not held:
            held.extend([request] if request.path.endswith("/plan.json") and request.kind == "put" else [])
        return rule(request) if held else None

    return choose


def same_weights(out: Place, expected: dict[str, str]) -> bool:
    """Whether all is as in a merge from the disk but for the files that name the models."""
    found = out.hash()
    named = {"README.md", "recipe.yml"}
    return found.keys() == expected.keys() and {n for n in found if found[n] != expected[n]} <= named


# --- reading ---


@pytest.mark.parametrize(
    "met",
    [
        (faults.refuse(500, "InternalError"), faults.refuse(503, "SlowDown"), faults.refuse(429, "TooManyRequests")),
        (faults.lose_answer(), faults.reset_after(0), faults.truncate_after(0)),
        (faults.reset_after(20_000), faults.truncate_after(20_000)),
        (faults.change_length(-10), faults.change_length(10)),
        (faults.start_slowly(0.05),),
    ],
    ids=["refused", "lost", "broken off", "of other lengths", "late"],
)
def test_reads_that_fail_at_first_change_nothing(
    met: Sequence[Fault], proxy: Proxy, source: str, expected: dict[str, str], tmp_path: Path
) -> None:
    plan = plan_of(source)
    proxy.rule = of_weights(lambda request: met[request.attempt % len(met)] if request.attempt < 6 else None)
    run_here(plan, tmp_path / "out")
    found = hash_output(tmp_path / "out")
    assert {name for name in expected if found[name] != expected[name]} == {"README.md", "recipe.yml"}
    assert proxy.journal.count_faults().keys() == {fault.name for fault in met}


def test_a_range_that_always_breaks_off_is_put_together(proxy: Proxy, out: Place) -> None:
    content = random.Random(0).randbytes(10_000_000)
    out.put("large", content)
    proxy.rule = only(faults.truncate_after(600_000), "get")
    pin, buffer = pin_file(f"{out.url}/large"), bytearray(len(content) - 10)
    read_into(pin, 5, memoryview(buffer))
    assert buffer == content[5:-5]
    assert 16 < proxy.journal.count()["get"] < 45, "what came before the end is not asked for again"


def test_a_throttled_server_changes_nothing(proxy: Proxy, source: str, expected: dict[str, str], out: Place) -> None:
    proxy.rule = only(faults.throttle(5e6))
    run_here(plan_of(source), out.url)
    assert same_weights(out, expected)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (faults.refuse(500, "InternalError"), "the server answers 500"),
        (faults.refuse(503, "SlowDown"), "the server answers 503"),
        (faults.lose_answer(), "ConnectionResetError|Connection aborted|reset"),
        (faults.reset_after(0), "reset by peer"),
        (faults.truncate_after(0), "the connection was closed before the first byte"),
        (faults.change_length(-10), r"the answer has \d+ bytes instead of \d+"),
        (faults.change_length(10), r"the answer has \d+ bytes instead of \d+"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_reads_that_always_fail_end_the_merge_with_the_cause(
    fault: Fault, cause: str, proxy: Proxy, source: str, out: Place
) -> None:
    plan = plan_of(source)
    proxy.rule = of_weights(only(fault, "get"))
    with pytest.raises(StorageError, match=rf"model.safetensors: reading at byte \d+ failed 8 times.*({cause})"):
        run_here(plan, out.url)
    assert not out.is_loadable()


@pytest.mark.parametrize("fault", [faults.change_etag(), faults.change_bytes()], ids=lambda fault: fault.name)
@pytest.mark.parametrize("skipped", [0, 7])
def test_another_version_of_a_model_ends_the_merge(
    fault: Fault, skipped: int, proxy: Proxy, source: str, expected: dict[str, str], out: Place
) -> None:
    """At once or half way: what was read before is of the version that was planned, and so is all that is written."""
    plan = plan_of(source)
    left = [skipped]

    def change(request: Request) -> Fault | None:
        left[0] -= 1
        return fault if left[0] < 0 else None

    proxy.rule = of_weights(change)
    with pytest.raises(SourceChanged, match=r"model\.safetensors: changed since the plan was made: .* plan again"):
        run_here(plan, out.url)
    assert not out.is_loadable()
    proxy.rule = faults.never
    run_here(plan, out.url)
    assert same_weights(out, expected)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_model_that_is_changed_half_way_ends_the_merge(
    change: str, proxy: Proxy, seaweed_server: S3, models: Path, out: Place
) -> None:
    place, name = new_place(seaweed_server, name=change).fill(models), "B/model.safetensors"
    content = place.read()[name]
    other = content[:-1] + bytes([content[-1] ^ 1])
    plan = plan_of(place.url)
    asked: list[Request] = []

    def change_before_the_tenth(request: Request) -> None:
        asked.append(request)
        if len(asked) == 10:
            place.put(name, other) if change == "replaced" else place.delete(name)

    proxy.rule = of_weights(change_before_the_tenth)
    with pytest.raises(SourceChanged, match=r"B/model\.safetensors: changed since the plan was made: .* plan again"):
        run_here(plan, out.url)
    assert len(asked) >= 10
    assert not out.is_loadable()


def test_a_server_without_ranges_is_refused(proxy: Proxy, source: str, out: Place) -> None:
    plan = plan_of(source)
    proxy.rule = of_weights(only(faults.ignore_range(), "get"))
    with pytest.raises(StorageError, match="its server does not serve ranges"):
        run_here(plan, out.url)
    assert not out.is_loadable()


# --- writing ---


@pytest.mark.parametrize("kind", WRITES)
def test_writes_that_are_refused_at_first_change_nothing(
    kind: str, proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    status = (500, "InternalError") if kind in ("part", "list") else (503, "SlowDown")
    plan = plan_of(models)
    proxy.rule = after_the_start(only(faults.refuse(*status), kind, attempts=OFTEN))
    run_here(plan, out.url)
    assert out.hash() == expected
    assert out.uploads() == {}
    assert proxy.journal.count_faults()


def test_an_answer_that_is_lost_is_no_conflict(
    proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    """The server did it; whoever asks again is told that it is there already, or no more."""
    proxy.rule = only(faults.lose_answer(), "create", "part", "complete", "put", "delete", attempts=1)
    run_here(plan_of(models), out.url)
    assert out.hash() == expected
    assert out.uploads() == {}
    lost = {exchange.request.kind for exchange in proxy.journal.exchanges if exchange.fault}
    assert lost == {"create", "part", "complete", "put", "delete"}
    assert ".mergemill/lock" not in out.sizes()


def test_uploads_that_break_off_are_sent_again(
    proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    proxy.rule = after_the_start(only(faults.reset_upload_after(10), "part", "put", attempts=OFTEN))
    run_here(plan_of(models), out.url)
    assert out.hash() == expected
    assert proxy.journal.count_faults()["reset upload"] >= 10 * OFTEN


@pytest.mark.parametrize("kind", ["create", "part", "complete", "list_parts", "list_uploads"])
def test_writes_that_always_fail_end_the_merge_with_the_cause(
    kind: str, proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    plan = plan_of(models)
    proxy.rule = only(faults.refuse(503, "SlowDown"), kind)
    with pytest.raises(StorageError, match=r"failed 8 times, at last with: SlowDown \(503\)"):
        run_here(plan, out.url)
    assert not out.is_loadable()
    proxy.rule = faults.never
    run_here(plan, out.url)
    assert out.hash() == expected
    assert out.uploads() == {}


def test_a_commit_that_cannot_write_its_files_is_gone_on_with(
    proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    plan = plan_of(models)
    storm = only(faults.refuse(503, "SlowDown"), "put")
    proxy.rule = lambda request: storm(request) if request.path.endswith("/config.json") else None
    with pytest.raises(StorageError, match=r"config.json failed 8 times, at last with: SlowDown \(503\)"):
        run_here(plan, out.url)
    assert not out.is_loadable()
    proxy.rule = faults.never
    assert run_here(plan, out.url).redone_parts == 0
    assert out.hash() == expected


def test_uploads_that_are_noted_in_words_cut_short_end_the_merge_with_the_cause(
    proxy: Proxy, models: Path, expected: dict[str, str], out: Place
) -> None:
    """By a server that sends less than was written, under a length that fits it; then it is gone on with."""
    plan = plan_of(models)
    proxy.rule = only(faults.refuse(503, "SlowDown"), "complete")
    with pytest.raises(StorageError):
        run_here(plan, out.url)
    cut = faults.change_length(-7)
    proxy.rule = lambda request: cut if request.path.endswith("/uploads.json") and request.method == "GET" else None
    with pytest.raises(OutputError, match=r"/uploads\.json: is damaged, .*: Invalid JSON: EOF"):
        run_here(plan, out.url)
    assert not out.is_loadable()
    proxy.rule = faults.never
    assert run_here(plan, out.url).redone_parts == 0
    assert out.hash() == expected
    assert out.uploads() == {}


def test_an_abort_that_fails_can_be_repeated(proxy: Proxy, models: Path, out: Place) -> None:
    plan = plan_of(models)
    proxy.rule = only(faults.refuse(503, "SlowDown"), "complete")
    with pytest.raises(StorageError):
        run_here(plan, out.url)
    for kind in ("list_uploads", "abort", "delete"):
        proxy.rule = only(faults.refuse(503, "SlowDown"), kind)
        with pytest.raises(StorageError, match="SlowDown"):
            abort(out.url)
    proxy.rule = only(faults.lose_answer(), "abort", "delete", attempts=1)
    abort(out.url)
    assert out.sizes() == out.uploads() == {}


def test_the_first_error_is_told_when_the_storage_fails_altogether(proxy: Proxy, models: Path, out: Place) -> None:
    """Neither the receipts nor the lease, which cannot be written then either, hide it."""
    plan = plan_of(models)

    def fail(event: Event) -> None:
        if isinstance(event, PartFinished):
            proxy.rule = only(faults.refuse(503, "SlowDown"))
            raise SourceChanged("the first error")

    with pytest.raises(SourceChanged, match="the first error"):
        run_here(plan, out.url, on_event=fail)


# --- copying by the server ---


def plan_copy(models: str) -> Plan:
    """Plan the copy of a model of 18 MB, in parts of at least 5 MiB."""
    with parts_of(5 << 20):
        return make_plan(make_recipe_of({"merge_method": "passthrough", "models": [{"model": f"{models}/A"}]}))


def test_copies_that_are_refused_or_whose_answer_is_lost_are_asked_for_again(
    proxy: Proxy, seaweed_server: S3, large_family: Path, out: Place
) -> None:
    plan = plan_copy(put_family(seaweed_server, large_family).url)
    met = [faults.refuse(503, "SlowDown")] * OFTEN + [faults.lose_answer()]
    proxy.rule = lambda request: met[request.attempt] if request.kind == "copy_part" and request.attempt < 8 else None
    run_here(plan, out.url)
    content = (large_family / "A" / "model.safetensors").read_bytes()
    header = plan.shards[0].header
    assert out.read()[plan.shards[0].name] == header + content[-(plan.write_bytes - len(header)) :]
    assert proxy.journal.count_faults().keys() == {"refuse 503", "lose answer"}
    assert out.uploads() == {}


def test_copies_that_always_fail_end_the_merge_with_the_cause(
    proxy: Proxy, seaweed_server: S3, large_family: Path, out: Place
) -> None:
    plan = plan_copy(put_family(seaweed_server, large_family).url)
    proxy.rule = only(faults.refuse(503, "SlowDown"), "copy_part")
    with pytest.raises(StorageError, match=r"part \d+ failed 8 times, at last with: SlowDown \(503\)"):
        run_here(plan, out.url)
    assert not out.is_loadable()


# --- everything ---

SLOW = (faults.start_slowly(0.01), faults.throttle(5e6))
LOST = (
    faults.refuse(500, "InternalError"),
    faults.refuse(503, "SlowDown"),
    faults.lose_answer(),
    faults.reset_after(0),
    faults.reset_after(5000),
    faults.truncate_after(5000),
    faults.reset_upload_after(5000),
)
LIES = (faults.change_length(-7), faults.change_length(9), faults.change_etag(), faults.change_bytes())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_there_is_never_a_wrong_byte(
    seed: int, proxy: Proxy, source: str, expected: dict[str, str], out: Place
) -> None:
    """A tenth of all requests fail, at every other seed also with lies; what ends the merge is an error of ours."""
    proxy.rule = faults.at_random(seed, 0.1, (*SLOW, *LOST, *LIES) if seed % 2 else (*SLOW, *LOST))
    errors = list(run_to_the_end(lambda: run_here(plan_of(source), out.url), out, expected))
    assert same_weights(out, expected), errors
    assert out.uploads() == {}
    assert proxy.journal.count_faults()


def run_to_the_end(merge: Callable[[], Committed], out: Place, expected: dict[str, str]) -> Iterator[str]:
    """Merge until it is done; yields the errors before that, after each of which nothing wrong looks like a model."""
    for _ in range(30):
        try:
            merge()
        except MergemillError as error:
            told = f"{type(error).__name__}: {error}"
        else:
            return
        assert "\n" not in told
        assert not out.is_loadable() or same_weights(out, expected), told
        yield told
    pytest.fail("it is never done")
