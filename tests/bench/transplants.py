"""What matching pursuit takes a new token, beside mergekit-tokensurgeon: python tests/bench/transplants.py.

A model and a donor of one layer, bfloat16, random rows; most tokens are in both. mergekit takes the donors with the
fewest and with the second count of `--new`, ours all: CPU seconds (user and system, with the program's start), what one
more new token takes of mergekit, and what one of the most takes of ours, all counted.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from programs import PYTHON_VARIABLE, find_script
from rounds import measure_anew
from safetensors.torch import save_file

K = 64


def main() -> None:
    """Measure, and print a line for each run, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=int, default=30_000)
    parser.add_argument("--new", default="64,256,4096")
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    counts = [int(each) for each in options.new.split(",")]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = write_model(folder / "model", options.shared, 0, options.width)
        donors = {
            count: write_model(folder / f"donor-{count}", options.shared, count, options.width) for count in counts
        }
        theirs = {count: measure_theirs(model, donors[count], folder / "out") for count in counts[:2]}
        ours = {count: measure_ours(model, donors[count], folder / "out") for count in counts}
    slope = (theirs[counts[1]] - theirs[counts[0]]) / (counts[1] - counts[0])
    each = ours[counts[-1]] / counts[-1]
    sys.stdout.write(f"a new token: mergekit {slope * 1e3:.1f} ms, mergemill {each * 1e3:.1f} ms: {slope / each:.1f}\n")


def measure_ours(model: Path, donor: Path, out: Path) -> float:
    """Return the CPU seconds of mergemill."""
    return _measure("mergemill", [find_script("mergemill"), "transplant", str(model), str(donor), str(out)], out)


def measure_theirs(model: Path, donor: Path, out: Path) -> float:
    """Return the CPU seconds of mergekit."""
    script = Path(os.environ[PYTHON_VARIABLE]).with_name("mergekit-tokensurgeon")
    return _measure("mergekit", [str(script), str(model), str(donor), str(out), "-k", str(K), "--quiet"], out)


def _measure(name: str, command: list[str], out: Path) -> float:
    found = measure_anew(command, [out])
    sys.stdout.write(f"{name} {command[-4:]}: {found.cpu_s:.1f} CPU s, peak {found.peak_bytes >> 20} MiB\n")
    sys.stdout.flush()
    return found.cpu_s


def write_model(folder: Path, shared: int, new: int, width: int) -> Path:
    """Write a Llama with tied embeddings whose last `new` tokens no other has."""
    folder.mkdir()
    torch.manual_seed(new)
    rows, wide, narrow = shared + new, 64, width // 32
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokens = ["<s>", *(f"both{i}" for i in range(1, shared)), *(f"new{new}x{i}" for i in range(new))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", **special}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {each: i for i, each in enumerate(tokens)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


if __name__ == "__main__":
    main()
