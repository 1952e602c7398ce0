"""GGUF files are written as llama.cpp's own converter does, and read as the package gguf and transformers do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import read_tensors, write_json, write_llama
from runs.buckets import new_place
from runs.merging import SMALL_PART, parts_of, run_until, same_tensors
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import diff, inspect, make_convert_plan, make_plan, make_transplant_plan, run, verify
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.gguf.header import KINDS
from mergemill.engine.errors import CheckpointError, PlanError
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors import native
from mergemill.engine.tensors.blocks import Blocks
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned

transformers = pytest.importorskip("transformers")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are fewer for keys, and whose rotary embedding is that of Llama 3."""
    folder = write_llama(tmp_path_factory.mktemp("model") / "chat", seed=1, layers=2)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = LLAMA3 | {"original_max_position_embeddings": 8192}
    write_json(folder / "config.json", config)
    return folder


def convert(model: Path, out: Path, **asked: Any) -> Path:
    run(make_convert_plan(str(model), gguf="chat.gguf", **asked), out, workers=0)
    return out / "chat.gguf"


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Return what the package finds in a file, dequantised."""
    return {
        each.name: gguf.quants.dequantize(each.data, each.tensor_type).reshape(tuple(reversed(each.shape.tolist())))
        for each in gguf.GGUFReader(path).tensors
    }


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Do with queries and keys what the converter does."""
    return rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_names_values_and_order_of_heads_are_those_of_the_converter(model: Path, tmp_path: Path) -> None:
    found, stored = read_file(convert(model, tmp_path / "out", dtype="float32")), read_tensors(model)
    assert found.keys() - {"rope_freqs.weight"} == {
        "token_embd.weight", "output_norm.weight", "output.weight",
        *(f"blk.{i}.{name}.weight" for i in range(2) for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")),
    }  # fmt: skip
    expected = stored["model.layers.1.mlp.down_proj.weight"].float()
    assert torch.equal(torch.tensor(found["blk.1.ffn_down.weight"]), expected)
    for name, module, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        expected = permute(stored[f"model.layers.0.self_attn.{module}.weight"].float(), heads)
        assert torch.equal(torch.tensor(found[f"blk.0.{name}.weight"]), expected)


@pytest.mark.parametrize(
    ("asked", "kind"), [({}, "BF16"), ({"dtype": "float16"}, "F16"), ({"quantize": "q8_0"}, "Q8_0")]
)
def test_matrices_have_the_type_that_is_asked_for_and_norms_are_f32(
    model: Path, tmp_path: Path, asked: dict[str, str], kind: str
) -> None:
    path = convert(model, tmp_path / "out", **asked)
    reader = gguf.GGUFReader(path)
    assert {each.tensor_type.name for each in reader.tensors if len(each.shape) == 2} == {kind}
    assert {each.tensor_type.name for each in reader.tensors if len(each.shape) == 1} == {"F32"}
    assert reader.fields["general.file_type"].contents() == {"F16": 1, "Q8_0": 7, "BF16": 32}[kind]
    expected = read_tensors(model)["model.layers.0.mlp.up_proj.weight"].float().numpy()
    (made,) = (each for each in reader.tensors if each.name == "blk.0.ffn_up.weight")
    np.testing.assert_array_equal(made.data, gguf.quants.quantize(expected, gguf.GGMLQuantizationType[kind]))
    assert verify(path.parent).parts


def test_transformers_loads_the_file_and_its_tokens(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    stored = read_tensors(model)
    state = loaded.state_dict()
    assert all(torch.equal(state[name].float(), stored[name].float()) for name in stored)
    text = "hello world, 12"
    tokens = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokens(text).input_ids == transformers.AutoTokenizer.from_pretrained(model)(text).input_ids


def test_factors_of_the_rotary_embedding_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    found = read_file(convert(model, tmp_path / "out"))["rope_freqs.weight"]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.AutoConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (LLAMA3["rope_theta"] ** (torch.arange(0, 16, 2) / 16))  # type: ignore[operator]
    np.testing.assert_allclose(found, (plain / scaled).numpy(), rtol=1e-5)


def test_a_file_is_a_model_of_hugging_face_again(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "out")
    run(make_convert_plan(str(path), dtype="bfloat16"), tmp_path / "back", workers=0)
    assert same_tensors(tmp_path / "back", model)
    tokens = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", model)]
    text = "hello world, 12 \u00e9t\u00e9 <s></s>\n\n  it's"
    assert tokens[0](text).input_ids == tokens[1](text).input_ids
    assert tokens[0].decode(tokens[0](text).input_ids) == tokens[1].decode(tokens[1](text).input_ids)
    made, config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", model))
    assert {key: config[key] for key in made if key != "dtype"} == {key: made[key] for key in made if key != "dtype"}


def test_a_cut_and_a_killed_conversion_are_the_same_file(model: Path, tmp_path: Path, seaweed: S3) -> None:
    expected = convert(model, tmp_path / "whole", quantize="q8_0").read_bytes()
    with parts_of(SMALL_PART // 8):
        asked = make_convert_plan(str(model), quantize="q8_0", gguf="chat.gguf")
    assert len(asked.parts) > 4
    run_until(asked, tmp_path / "killed", 2)
    run(asked, tmp_path / "killed", workers=0)
    assert (tmp_path / "killed" / "chat.gguf").read_bytes() == expected
    place = new_place(seaweed)
    run(make_convert_plan(str(model), quantize="q8_0", gguf="chat.gguf"), place.url, workers=0)
    there = open_checkpoint(f"{place.url}/chat.gguf")
    assert {name: each.nbytes for name, each in there.tensors.items()} == {
        name: each.nbytes for name, each in open_checkpoint(str(tmp_path / "whole" / "chat.gguf")).tensors.items()
    }
    assert verify(place.url).parts


def test_a_file_is_an_input_of_a_merge(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "out", quantize="q8_0")
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(each), "parameters": {"weight": 0.5}} for each in (model, path)],
    }
    run(make_plan(recipe), tmp_path / "merged", workers=0)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    found = diff(str(model), str(tmp_path / "merged"), workers=0)
    assert all(each.deltas[0].relative < 0.01 for each in found.tensors)  # type: ignore[operator]
    assert inspect(path).quantization == "Q8_0 of llama.cpp; the types of its tensors"
    assert inspect(path).parameters == inspect(model).parameters


def test_a_file_that_is_passed_through_has_the_order_of_hugging_face(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "file")
    recipe: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(path), "layer_range": [0, 2]}]}],
    }
    run(make_plan(recipe), tmp_path / "out", workers=0)
    found, stored = read_tensors(tmp_path / "out"), read_tensors(model)
    assert all(torch.equal(found[name].float(), stored[name].float()) for name in stored)


def test_files_give_and_take_a_tokenizer(tmp_path: Path) -> None:
    folders = [
        write_llama(tmp_path / f"{vocab}", seed=vocab, layers=1, vocab=vocab, dtype="float32") for vocab in (256, 240)
    ]
    donor = folders[1]
    files = [convert(each, tmp_path / f"{each.name}_as_file") for each in folders]
    for place, pair in {"from_files": files, "from_folders": folders}.items():
        run(make_transplant_plan(*map(str, pair), k=3), tmp_path / place, workers=0)
    assert same_tensors(tmp_path / "from_files", tmp_path / "from_folders")
    made, expected = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "from_files", donor))
    assert made("hello world, 12").input_ids == expected("hello world, 12").input_ids


def test_the_command_takes_the_name_of_a_file(model: Path, tmp_path: Path) -> None:
    assert execute(["convert", str(model), str(tmp_path / "new" / "chat.gguf"), "--quiet"]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".mergemill", "README.md", "chat.gguf"]


def test_what_has_no_name_there_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=1, layers=1, extras=["scalar"])
    with pytest.raises(PlanError, match=r"tensor model.logit_scale \(BF16\) has no place in a GGUF file of llama"):
        make_convert_plan(str(other), gguf="x.gguf")
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | {"model_type": "gemma3"})
    with pytest.raises(CheckpointError, match="is of the family gemma3, which is not written as GGUF here; llama, "):
        make_convert_plan(str(other), gguf="x.gguf")
    with pytest.raises(PlanError, match="quantize 'fp8_block' is not written as GGUF; q8_0 is"):
        make_convert_plan(str(model), quantize="fp8_block", gguf="x.gguf")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    strange = write_llama(tmp_path / "strange", seed=1, layers=1)
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"which is not known here \(Whitespace\)"):
        make_convert_plan(str(strange), gguf="x.gguf")


def test_heads_that_the_settings_tell_wrongly_are_refused(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "out")
    twice = 2 * edit_setting(path, "llama.attention.head_count_kv", lambda heads: 2 * heads)
    with pytest.raises(CheckpointError, match=rf"k_proj\.weight of .* does not suit {twice} heads of 16 elements"):
        make_convert_plan(str(path), dtype="bfloat16")


def test_a_special_token_beyond_the_rows_is_ignored_as_llama_cpp_does(model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "out")
    eos = edit_setting(path, "tokenizer.ggml.eos_token_id", lambda eos: eos)
    edit_setting(path, "tokenizer.ggml.bos_token_id", lambda bos: bos + 1_000_000)
    run(make_convert_plan(str(path), dtype="bfloat16"), tmp_path / "again", workers=0)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ("bos_token_id" in config, config["eos_token_id"]) == (False, eos)


def edit_setting(path: Path, key: str, change: Callable[[int], int]) -> int:
    """Change a setting of 32 bits in a file; return what it was."""
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key) + 4  # after the type of the value
    was = int.from_bytes(data[at : at + 4], "little")
    path.write_bytes(data[:at] + change(was).to_bytes(4, "little") + data[at + 4 :])
    return was


def read_expression(expression: Expression, step: int) -> torch.Tensor:
    """Return all of it, read in spans of `step` elements with no more memory than it says."""
    pieces = []
    for start in range(0, expression.size, step):
        span = Span(start, min(start + step, expression.size))
        with Workspace(np.zeros(aligned(expression.slab_bytes(step, "F32")), np.uint8)) as work:
            pieces.append(expression.get_ready(()).slab(span, work, "F32").clone())
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.dtype], ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_the_package_does_whatever_the_spans(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
    blocks = np.random.default_rng(0).integers(0, 256, (6, kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name]).reshape(-1)
    path = tmp_path / "x"
    path.write_bytes(blocks.tobytes())
    stored = Stored(pin_file(path), 0, "U8", (blocks.size,))
    made = Blocks(stored, kind.name, kind.block, kind.block_bytes, (3, 2 * kind.block), "BF16")
    for step in (made.size, kind.block + 1, 7):
        np.testing.assert_array_equal(read_expression(made, step).numpy(), expected)
    with monkeypatch.context() as without:
        without.setattr(native, "load", lambda: None)
        np.testing.assert_array_equal(read_expression(made, kind.block + 1).numpy(), expected)


def test_every_type_that_the_package_dequantises_is_known() -> None:
    known = {kind.name for kind in KINDS.values()}
    assert {each.name for each in gguf.quants._type_traits} - known == {"NVFP4"}
