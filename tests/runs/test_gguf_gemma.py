"""GGUF files of Gemma 2 and 3: read as transformers reads them, and written as llama.cpp's converter does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import read_tensors, write_json
from sentencepieces import make_pieces, write_model

from mergemill.engine import make_convert_plan, run
from mergemill.engine.errors import CheckpointError

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24,
    "max_position_embeddings": 512, "vocab_size": len(make_pieces()),
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLASSES = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
OURS = {  # of a layer, beside what all families have
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@pytest.fixture(scope="module", params=CLASSES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Gemma, as transformers saves it, and ``model.gguf`` as the converter would make it."""
    folder = tmp_path_factory.mktemp(request.param)
    made: Any = getattr(transformers, CLASSES[request.param])
    torch.manual_seed(1)
    model = made(made.config_class(**SIZES)).float()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    write_model(folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    write_as_converter(folder / "model.gguf", request.param, read_tensors(folder))
    return folder


def write_as_converter(path: Path, arch: str, tensors: dict[str, torch.Tensor]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    writer.add_sliding_window(SIZES["sliding_window"])
    if arch == "gemma3":
        writer.add_rope_freq_base(1e6)
    else:
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    pieces = make_pieces()
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, array in iter_as_converter(arch, tensors):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def iter_as_converter(arch: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Name them by the package's own map, and add 1 to norms."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, SIZES["num_hidden_layers"])
    for name, tensor in tensors.items():
        stem = names.get_name(name.removesuffix(".weight"))
        yield f"{stem}.weight", (tensor.float() + name.endswith("norm.weight")).numpy()


@pytest.fixture(scope="module")
def back(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the converter's file is converted to."""
    out = tmp_path_factory.mktemp("back")
    run(make_convert_plan(str(family / "model.gguf"), dtype="float32"), out, workers=0)
    return out


def test_a_file_is_read_as_transformers_reads_it(family: Path, back: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(family, gguf_file="model.gguf", dtype=torch.float32)
    state, found = loaded.state_dict(), read_tensors(back)
    assert state.keys() - found.keys() == {"lm_head.weight"}
    assert all(torch.equal(found[name], state[name]) for name in found)


def test_the_config_says_what_the_model_had(family: Path, back: Path) -> None:
    made, before = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (back, family))
    kept = before.keys() - {"_name_or_path", "_sliding_window_pattern"}
    assert {key: made[key] for key in kept} == {key: before[key] for key in kept}
    assert "full_attention" in made["layer_types"]
    ids = torch.arange(40)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits
        for folder in (back, family)
    ]
    assert torch.allclose(*logits, atol=1e-5)


def test_a_file_is_written_as_the_converter_writes_it(family: Path, tmp_path: Path) -> None:
    run(make_convert_plan(str(family), gguf="model.gguf", dtype="float32"), tmp_path / "out", workers=0)
    made, expected = (gguf.GGUFReader(folder / "model.gguf") for folder in (tmp_path / "out", family))
    arrays = {each.name: each.data for each in made.tensors}
    assert arrays.keys() == {each.name for each in expected.tensors}
    for each in expected.tensors:
        np.testing.assert_array_equal(arrays[each.name], each.data)
    kept = [name for name in expected.fields if not name.startswith("GGUF.")]
    for name in kept:
        assert made.fields[name].contents() == expected.fields[name].contents(), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8; llama.cpp calculates as if 16"),
        ({"layer_types": ["sliding_attention"] * 7}, r"layer_types is .*; llama.cpp calculates as if \['sliding"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0, which GGUF cannot say"),
        ({"sliding_window": None}, "sliding_window is None, no whole number"),
    ],
)
def test_what_llama_cpp_would_calculate_otherwise_is_refused(
    family: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    for path in family.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    write_json(tmp_path / "config.json", json.loads((family / "config.json").read_text()) | changed)
    with pytest.raises(CheckpointError, match=message):
        make_convert_plan(str(tmp_path), gguf="model.gguf")
