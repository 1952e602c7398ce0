"""The second opinion: `verify` asks the safetensors library what it finds in a shard."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergemill.engine.errors import VerifyError
from mergemill.engine.runs import opinion
from mergemill.engine.runs.opinion import check_by_library
from mergemill.engine.storage.ranges import Pin, pin_file
from mergemill.engine.storage.store import ENVIRONMENT

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4).to(torch.bfloat16),
    "vector": torch.arange(5, dtype=torch.int64),
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read_head(path: Path) -> bytes:
    stored = path.read_bytes()
    return stored[: 8 + struct.unpack("<Q", stored[:8])[0]]


def pin(path: Path) -> Pin:
    found = pin_file(str(path))
    assert found is not None
    return found


def change(head: bytes, **entries: object) -> bytes:
    text = json.dumps(json.loads(head[8:]) | entries).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_sound_shard_is_found_as_it_was_written(shard: Path) -> None:
    check_by_library(pin(shard), read_head(shard), ENVIRONMENT)


def test_other_tensors_shapes_and_values_than_ours_are_told(shard: Path) -> None:
    head = read_head(shard)
    entry = json.loads(head[8:])["vector"]
    more = change(head, other=entry)
    with pytest.raises(VerifyError, match="safetensors finds other tensors in it than were written"):
        check_by_library(pin(shard), more, ENVIRONMENT)
    with pytest.raises(VerifyError, match=r"safetensors finds vector as I64 of \[5\]"):
        check_by_library(pin(shard), change(head, vector={**entry, "shape": [1, 5]}), ENVIRONMENT)
    with pytest.raises(VerifyError, match=r"safetensors finds other values in \w+ than lie there"):
        check_by_library(pin(shard), head + b" ", ENVIRONMENT)  # so that ours are looked for a byte later


def test_a_shard_that_the_library_does_not_read_is_told(shard: Path) -> None:
    head = read_head(shard)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(VerifyError, match="safetensors does not read it: "):
        check_by_library(pin(shard), head, ENVIRONMENT)


def test_of_a_shard_elsewhere_the_library_reads_the_header_alone(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("no value of it is read")

    monkeypatch.setattr(opinion, "read_into", read)
    there = Pin("s3://bucket/model.safetensors", shard.stat().st_size, "")
    check_by_library(there, read_head(shard), ENVIRONMENT)
    with pytest.raises(VerifyError, match="safetensors does not read it: "):
        check_by_library(Pin(there.url, there.size_bytes + 1, ""), read_head(shard), ENVIRONMENT)
