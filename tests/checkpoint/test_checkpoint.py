"""Opening: every layout that is stored, and one clear line for everything that is no model."""

import json
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemill.engine.checkpoint import INDEX_NAME, open_checkpoint, read_file
from mergemill.engine.errors import CheckpointError, HeaderError, IndexFileError
from mergemill.engine.storage.ranges import close_all, read_into

TENSORS = {
    "model.layers.0.w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.layers.10.w": torch.ones(4, dtype=torch.bfloat16),
    "model.layers.2.w": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 5),
}


def write_sharded(folder: Path, shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(shards):
        part = dict(list(TENSORS.items())[number::shards])
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_single(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, folder / name)
    return folder


def assert_holds_tensors(checkpoint):
    assert list(checkpoint.tensors) == sorted(TENSORS)
    for name, stored in checkpoint.tensors.items():
        buffer = bytearray(stored.nbytes)
        read_into(stored.file, stored.offset_bytes, memoryview(buffer))
        expected = TENSORS[name]
        assert stored.name == name
        assert stored.shape == tuple(expected.shape)
        assert bytes(buffer) == bytes(expected.reshape(-1).view(torch.uint8).tolist())


def message_of(ref: str | Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(str(ref))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_are_one_checkpoint(tmp_path, shards):
    assert_holds_tensors(open_checkpoint(str(write_sharded(tmp_path, shards))))


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_single_file_is_a_checkpoint(tmp_path, name):
    assert_holds_tensors(open_checkpoint(str(write_single(tmp_path, name))))


def test_model_safetensors_is_the_model_among_other_files(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_holds_tensors(open_checkpoint(str(write_single(tmp_path))))


def test_path_of_a_file_opens_that_file_without_config(tmp_path):
    (write_single(tmp_path) / "config.json").write_text('{"a": 1}')
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"))
    assert_holds_tensors(checkpoint)
    assert (checkpoint.config, checkpoint.config_text, checkpoint.files) == ({}, b"", ())
    assert checkpoint.path == str(tmp_path)


def test_file_url_and_home_folder_are_local(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_single(tmp_path / "a model")
    for ref in (folder.as_uri(), "~/a model"):
        checkpoint = open_checkpoint(ref)
        assert (checkpoint.ref, checkpoint.path) == (ref, str(folder))


def test_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_single(tmp_path / "org" / "name")
    checkpoint = open_checkpoint("org/name")
    assert (checkpoint.ref, checkpoint.path) == ("org/name", str(tmp_path / "org" / "name"))


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot = write_sharded(tmp_path / "snapshots" / "abc")
    (tmp_path / "blobs").mkdir()
    for path in sorted(snapshot.iterdir()):
        blob = tmp_path / "blobs" / f"{path.name}.blob"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    assert_holds_tensors(open_checkpoint(str(snapshot)))


def test_config_is_kept_as_stored(tmp_path):
    text = b'{"x_unknown":  [1],\n"model_type": "llama"}'
    (write_single(tmp_path) / "config.json").write_bytes(text)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == {"x_unknown": [1], "model_type": "llama"}
    assert checkpoint.config_text == text


def test_small_files_are_listed_and_weights_are_not(tmp_path):
    write_sharded(tmp_path)
    names = ["README.md", "config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"]
    others = ["pytorch_model.bin", "a.gguf", "pytorch_model.bin.index.json", ".gitattributes", "sub/x.json"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.files == tuple(sorted(names))
    assert read_file(checkpoint, "README.md") == b"{}"
    with pytest.raises(CheckpointError, match=r"has no file '../x'"):
        read_file(checkpoint, "../x")


def test_checkpoint_can_be_pickled(tmp_path):
    checkpoint = open_checkpoint(str(write_sharded(tmp_path)))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A Hub that cannot be reached, with an empty cache."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    close_all()
    yield
    close_all()


@pytest.mark.usefixtures("no_hub")
def test_hub_name_that_is_no_folder_is_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began_s = time.monotonic()
    message = message_of("org/name-7B")
    assert message.startswith(
        "org/name-7B: no such folder; hf://org/name-7B: the Hub at http://127.0.0.1:9 cannot be reached (Connect"
    )
    assert message.endswith("and its cache has no such model; when it can: hf download org/name-7B")
    assert time.monotonic() - began_s < 10


def test_hub_name_without_the_client_of_the_hub_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("mergemill.engine.storage.hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    close_all()
    assert message_of("org/name") == (
        "org/name: no such folder; hf://: huggingface_hub is not installed; install mergemill[hub]"
    )


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf://name", "hf://name: a model on the Hub is written hf://org/name[@revision][/folder]"),
        (
            "no-such://a/b",
            "no-such://: no such kind of storage; known are s3, hf, gs, az, http, https, file, memory "
            "and whatever fsspec knows",
        ),
        ("/no/such/folder", "/no/such/folder: no such file or folder"),
        ("~nobody-at-all/x", "~nobody-at-all/x: no such file or folder"),
        ("x" * 999, f"{'x' * 999}: cannot be read: File name too long"),
        ("file:///no/such", "file:///no/such: no such file or folder"),
    ],
)
def test_place_that_cannot_be_read_is_named(ref, message):
    assert message_of(ref) == message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no file of weights (.safetensors .bin .pt .pth .ckpt)"),
        (["config.json"], "has no file of weights (.safetensors .bin .pt .pth .ckpt)"),
        (["training_args.bin"], "has no file of weights (.safetensors .bin .pt .pth .ckpt)"),
        (["m-Q4_K_M.gguf"], "has m-Q4_K_M.gguf but no safetensors file; name that file itself"),
        (["a.safetensors", "b.safetensors"], f"has 2 safetensors files and no {INDEX_NAME}"),
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            "is a LoRA adapter, not a model; write it as <model>+m",
        ),
    ],
)
def test_folder_without_a_model_says_what_it_has(tmp_path, names, message):
    (tmp_path / "m").mkdir()
    for name in names:
        (tmp_path / "m" / name).write_bytes(b"")
    assert message_of(tmp_path / "m") == f"{tmp_path}/m: {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.h5", "is neither a safetensors file nor one of torch.save; convert it to one first"),
        ("m.yml", "is neither a folder nor a file of weights (.safetensors .bin .pt .pth .ckpt)"),
    ],
)
def test_file_that_is_no_safetensors_says_so(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    assert message_of(tmp_path / name) == f"{tmp_path / name}: {message}"


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_config_that_is_not_json_is_an_error(tmp_path, text):
    (write_single(tmp_path) / "config.json").write_bytes(text)
    assert message_of(tmp_path).startswith(f"{tmp_path}/config.json: is not JSON: ")


def test_config_that_is_no_object_is_an_error(tmp_path):
    (write_single(tmp_path) / "config.json").write_text("[]")
    assert message_of(tmp_path) == f"{tmp_path}/config.json: is not a JSON object"


def test_missing_shard_is_an_error(tmp_path):
    (write_sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IndexFileError) as refusal:
        open_checkpoint(str(tmp_path))
    assert str(refusal.value) == (
        f"{tmp_path}/{INDEX_NAME}: shard 'model-00002-of-00002.safetensors' of 2 not there; is the download complete?"
    )


def test_truncated_shard_is_named_as_the_user_knows_it(tmp_path):
    blob = tmp_path / "blob"
    shard = write_sharded(tmp_path / "m") / "model-00001-of-00002.safetensors"
    blob.write_bytes(shard.read_bytes()[:-1])
    shard.unlink()
    shard.symlink_to(blob)
    with pytest.raises(HeaderError, match=r"model-00001-of-00002\.safetensors: cut short: 32 bytes of data"):
        open_checkpoint(str(tmp_path / "m"))


def test_tensor_in_two_shards_is_an_error(tmp_path):
    first = write_sharded(tmp_path) / "model-00001-of-00002.safetensors"
    save_file(TENSORS, first)
    with pytest.raises(IndexFileError, match="is in two shards"):
        open_checkpoint(str(tmp_path))


def test_index_beside_a_whole_model_is_ambiguous(tmp_path):
    write_single(write_sharded(tmp_path))
    assert message_of(tmp_path).endswith("does not name model.safetensors, which is beside it; remove one of them")


def test_index_of_one_file_is_no_conflict(tmp_path):
    weight_map = dict.fromkeys(TENSORS, "model.safetensors")
    (write_single(tmp_path) / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert_holds_tensors(open_checkpoint(str(tmp_path)))
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors", "README.md"])
def test_a_pipe_in_the_place_of_a_file_is_no_model(tmp_path, name):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: it is a pipe, not a file"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_small_file_is_no_larger_than_such_files_are(tmp_path, name):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=f"{name}: has 1099511627776 bytes; such a file has at most"):
        open_checkpoint(str(tmp_path))
