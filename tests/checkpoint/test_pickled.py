"""Files of ``torch.save`` are read as what they are: every dtype, format and layout, tensor by tensor."""

import argparse
import json
import random
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint.torch_files import SOUND, SOUND_LEGACY, write_torch
from fuzz.mutations import mutate
from fuzz.targets import try_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergemill.engine.checkpoint import Checkpoint, open_checkpoint
from mergemill.engine.errors import CheckpointError, IndexFileError, PickledError
from mergemill.engine.offers.formats import express
from mergemill.engine.storage.ranges import read_into
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.rounds import finish_rounds
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip
COMPLEX = torch.ones(2, dtype=torch.complex64)
FORMATS = {"zip": True, "legacy": False}


def make_tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype, and of every way to lie in a storage that is read."""
    numbers = torch.arange(24, dtype=torch.float32)
    tensors = {str(dtype): numbers[:6].to(dtype).reshape(2, 3) for dtype in DTYPES}
    matrix = numbers.reshape(4, 6).clone()
    return tensors | {
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(matrix.clone()),
        "whole": matrix,
        "tied": matrix,
        "rows": matrix[1:3],
        "transposed": numbers.reshape(4, 6).clone().t(),
        "channels last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(5).expand(1, -1),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    }


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a tensor as a merge reads it."""
    expression = express(checkpoint.tensors[name])
    ready = finish_rounds(expression.rounds(), (), lambda asked: pytest.fail("it has rounds"))
    with Workspace(np.empty(1 << 16, np.uint8)) as work:
        data = bytearray(ready.encode(Span(0, expression.size), work, expression.dtype))
    dtype = TORCH_DTYPES[expression.dtype]
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(expression.shape)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether tensors are equal to the bit."""
    expected = expected.detach().contiguous()
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and (found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist())
    )


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_layout_is_read_to_the_bit(zipped: bool, protocol: int, tmp_path: Path) -> None:
    tensors = make_tensors()
    path = write_torch(tmp_path / "x.pt", tensors, zipped=zipped, protocol=protocol)
    checkpoint = open_checkpoint(str(path))
    assert sorted(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert equal(read_tensor(checkpoint, name), tensor), name
    assert checkpoint.left_out == ()


@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
def test_weights_are_not_read_to_open_them(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_torch(tmp_path / "x.pt", {str(i): torch.zeros(1 << 20) for i in range(4)}, zipped=zipped)
    read = []

    def count(pin, offset_bytes, buffer, *rest):
        read.append(len(buffer))
        read_into(pin, offset_bytes, buffer, *rest)

    monkeypatch.setattr("mergemill.engine.checkpoint.pickles.reader.read_into", count)
    assert len(open_checkpoint(str(path)).tensors) == 4
    assert sum(read) < 200_000 < path.stat().st_size


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6)[:, 1:3],
        torch.arange(24.0)[::2],
        torch.zeros(1).expand(9),
        torch.eye(3).diagonal(),
    ],
)
def test_a_view_with_gaps_or_repetitions_is_refused_by_name(tensor: torch.Tensor, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pt", {"model.w": tensor})
    message = r"x\.pt: tensor model\.w is a view of its storage with gaps or repetitions .*save it as \.contiguous\(\)"
    with pytest.raises(PickledError, match=message):
        open_checkpoint(str(path))


@pytest.mark.parametrize("view", [COMPLEX.conj(), COMPLEX.conj().imag])
def test_a_view_of_other_values_than_those_stored_is_refused(view: torch.Tensor, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pt", {"w": view})
    with pytest.raises(PickledError, match=r"has a tensor that is stored as a view: (conj|neg)"):
        open_checkpoint(str(path))


def test_what_trainers_save_beside_a_model_is_left_out_and_named(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": linear.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(lr=0.1, scale=np.float64(0.5)),
        "rng": np.arange(3),
        "defaults": defaultdict(dict),
        "seen": {1, 2},
    }
    path = write_torch(tmp_path / "last.ckpt", saved)
    checkpoint = open_checkpoint(str(path))
    assert {name: each.shape for name, each in checkpoint.tensors.items()} == {"weight": (2, 3), "bias": (2,)}
    assert checkpoint.left_out == (
        f"{path}: only the tensors of the model are read of it; left out: epoch, pytorch-lightning_version, "
        "optimizer_states, hyper_parameters, rng, defaults, seen",
    )


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "module", "params", "params_ema", "ema", "generator", "net"]
)
def test_a_model_is_found_under_the_keys_of_trainers(key: str, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pth", {key: {"w": torch.zeros(1)}, "step": torch.tensor(1)})
    checkpoint = open_checkpoint(str(path))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.left_out[0].endswith("left out: step")


def test_keys_of_trainers_may_be_in_each_other(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pth", {"model": {"state_dict": {"w": torch.zeros(1)}, "args": 1}})
    checkpoint = open_checkpoint(str(path))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.left_out[0].endswith("left out: model.args")


def test_of_several_models_one_is_chosen_or_none_is_read(tmp_path: Path) -> None:
    saved = {"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1), "a.b": {"v": torch.ones(2)}}}
    path = write_torch(tmp_path / "x.pth", saved)
    with pytest.raises(PickledError, match=r"holds several models, params, params_ema; say which: .*x\.pth#params$"):
        open_checkpoint(str(path))
    assert read_tensor(open_checkpoint(f"{path}#params_ema"), "w").item() == 1
    assert list(open_checkpoint(f"{path}#params_ema.a.b").tensors) == ["v"]
    with pytest.raises(PickledError, match=r"has no 'ema'; it has params, params_ema$"):
        open_checkpoint(f"{path}#ema")


@pytest.mark.parametrize(
    ("saved", "why"),
    [
        ([torch.zeros(1)], "holds a list, and no dictionary of tensors"),
        (torch.zeros(1), "holds one tensor, and no dictionary of tensors"),
        ({"epoch": 1}, "holds no tensors; it has epoch"),
        ({}, "holds no tensors; it has nothing"),
        ({"netG": {"w": torch.zeros(1)}}, "holds tensors under netG; say which: .*#netG"),
        ({1: torch.zeros(1), "1": torch.zeros(1)}, "has a number and a text that are one name"),
        (torch.nn.Linear(1, 1), "asks for torch.nn.modules.linear.Linear, which is no part of a tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "holds complex numbers of 128 bits"),
        ({"w": torch.zeros(2).to_sparse()}, "holds a sparse tensor"),
        ({"w": torch.empty(2, device="meta")}, "holds a tensor on the meta device"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(saved: object, why: str, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pt", saved)
    with pytest.raises(PickledError, match=why):
        open_checkpoint(str(path))


def test_a_state_dict_as_torch_makes_it_is_read(tmp_path: Path) -> None:
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(2, 2), b=torch.nn.BatchNorm1d(2)))
    checkpoint = open_checkpoint(str(write_torch(tmp_path / "x.bin", model.state_dict())))
    assert sorted(checkpoint.tensors) == sorted(model.state_dict())


def write_sharded(folder: Path) -> None:
    weight_map = {}
    for i in range(2):
        name = f"pytorch_model-{i + 1:05}-of-00002.bin"
        write_torch(folder / name, {f"w{i}": torch.full((2,), float(i))})
        weight_map[f"w{i}"] = name
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_pickled_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert [read_tensor(checkpoint, name)[0].item() for name in ("w0", "w1")] == [0, 1]
    assert checkpoint.files == ()


def test_a_pickled_shard_that_is_missing_is_an_error(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(IndexFileError, match="is the download complete"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards, and not the others"):
        open_checkpoint(str(tmp_path))


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_torch(tmp_path / "pytorch_model.bin", {"w": torch.zeros(1)})
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_tensor(open_checkpoint(str(tmp_path)), "w").item() == 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_the_only_pickle_of_a_folder_is_its_model(name: str, tmp_path: Path) -> None:
    write_torch(tmp_path / name, {"w": torch.ones(1)})
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / other).write_bytes(b"x")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["w"]


def test_several_pickles_without_an_index_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        write_torch(tmp_path / f"consolidated.0{i}.pth", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"has 2 files of torch\.save \(consolidated\.00"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("tied", [True, None, False])
def test_a_head_that_is_the_embedding_is_stored_once(tied: bool | None, tmp_path: Path) -> None:
    weight = torch.ones(4, 2)
    write_torch(tmp_path / "pytorch_model.bin", {"model.embed_tokens.weight": weight, "lm_head.weight": weight})
    (tmp_path / "config.json").write_text(json.dumps({} if tied is None else {"tie_word_embeddings": tied}))
    head = ["lm_head.weight"] if tied is False else []
    assert list(open_checkpoint(str(tmp_path)).tensors) == [*head, "model.embed_tokens.weight"]


def test_a_head_that_is_equal_and_stored_apart_stays(tmp_path: Path) -> None:
    tensors = {name: torch.ones(4, 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_torch(tmp_path / "pytorch_model.bin", tensors)
    assert len(open_checkpoint(str(tmp_path)).tensors) == 2


def damaged(data: bytes, seed: int) -> bytes:
    """Return a file with something of it changed: bytes anywhere, or in its pickle or directory alone."""
    stream = random.Random(seed)
    if stream.random() < 0.3:
        return mutate(data, seed)
    found = bytearray(data)
    for _ in range(stream.choice((1, 1, 2, 5))):
        found[stream.randrange(len(found))] = stream.choice((0, 1, 0x28, 0x2E, 0x52, 0x71, 0x7F, 0x80, 0xFF))
    return bytes(found)


def test_a_damaged_file_is_read_or_refused_by_an_error_of_ours(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b.weight": torch.ones(2, 3, dtype=torch.bfloat16).t(), "c": torch.tensor(1)}
    saved = [tensors, {"state_dict": tensors, "epoch": 1, "args": argparse.Namespace(x=1)}]
    written = [write_torch(tmp_path / "x.pt", each, zipped=z).read_bytes() for each in saved for z in (True, False)]
    sources = [SOUND, SOUND_LEGACY, *written]

    @settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(source=st.sampled_from(sources), seed=st.integers(0, 1 << 32))
    def check(source: bytes, seed: int) -> None:
        try_target("pickle", damaged(source, seed))

    check()
