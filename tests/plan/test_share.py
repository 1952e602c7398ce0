"""Files of equal content are read once; all else stays as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plan.sketches import config, llama, write_sketch

from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.offers.formats import express
from mergemill.engine.plan.share import share_reads
from mergemill.engine.storage.pin import Pin, find_content
from mergemill.engine.tensors.slabs import Span

MD5 = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("url", "stamp"),
    [
        ("s3://a/b", f'etag:"{MD5}"'),
        ("s3://a/b", f'etag:"{MD5}-17"'),
        ("hf://a/b@c/d", "sha256:" + MD5 * 2),
    ],
)
def test_what_hashes_the_content_says_what_it_is(url: str, stamp: str) -> None:
    found = find_content(Pin(url, 7, stamp))
    assert found is not None
    assert found == find_content(Pin(url + "2", 7, stamp))
    assert found != find_content(Pin(url, 8, stamp))


@pytest.mark.parametrize(
    ("url", "stamp"),
    [
        ("/a/b", "mtime_ns:1"),
        ("memory://a", "created:2026-01-01"),
        ("http://a/b", f'etag:"{MD5}"'),  # may be anything that is this file's alone
        ("gs://a/b", f'etag:"{MD5}"'),
        ("s3://a/b", f'etag:W/"{MD5}"'),
        ("s3://a/b", 'etag:"some version"'),
        ("s3://a/b", f'etag:"{MD5.upper()}"'),
        ("s3://a/b", ""),
        ("hf://a/b@c/d", "commit:" + MD5),
    ],
)
def test_what_stands_for_a_version_does_not(url: str, stamp: str) -> None:
    assert find_content(Pin(url, 7, stamp)) is None


def stamp(checkpoint: Checkpoint, place: str, etags: dict[str, str]) -> Checkpoint:
    """Return the checkpoint as if it lay in S3, its shards with these ETags."""
    pins = {
        name: Pin(f"{place}/{name}", open_size(checkpoint, name), f'etag:"{etag * 32}"') for name, etag in etags.items()
    }
    tensors = {
        name: stored._replace(file=pins[Path(stored.file.url).name]) for name, stored in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def open_size(checkpoint: Checkpoint, name: str) -> int:
    return next(each.file.size_bytes for each in checkpoint.tensors.values() if each.file.url.endswith(name))


def test_equal_shards_are_read_from_the_first_model_and_named_as_their_own(tmp_path: Path) -> None:
    write_sketch(tmp_path / "a", llama(), config=config(), shards=2)
    opened = open_checkpoint(str(tmp_path / "a"))
    one, two = sorted({Path(each.file.url).name for each in opened.tensors.values()})
    models = {
        "a": stamp(opened, "s3://x/a", {one: "1", two: "2"}),
        "b": stamp(opened, "s3://x/b", {one: "1", two: "3"}),
        "c": stamp(opened, "s3://x/c", {one: "4", two: "3"}),
    }
    shared = share_reads(models)
    read_from = {
        model: {read.pin.url for stored in found.tensors.values() for read in express(stored).reads(Span(0, 1))}
        for model, found in shared.items()
    }
    assert read_from == {
        "a": {f"s3://x/a/{one}", f"s3://x/a/{two}"},
        "b": {f"s3://x/a/{one}", f"s3://x/b/{two}"},
        "c": {f"s3://x/c/{one}", f"s3://x/b/{two}"},
    }
    for model, found in models.items():
        before, after = ([express(x).describe() for x in each.tensors.values()] for each in (found, shared[model]))
        assert json.dumps(before) == json.dumps(after)
    assert {**shared["a"].tensors} == {**models["a"].tensors}
