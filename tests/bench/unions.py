"""What joining vocabularies costs, beside the same merge with equal ones: python tests/bench/unions.py.

Two models of nothing but an embedding, 256,000 tokens by 4,096 in bfloat16, linear, 512 MiB a worker. The second's
tokenizer is the first's, or has some thousand tokens of its own among equal ids, or these in random order; its weights
are the same file. Runs in turn: wall and CPU seconds, ratios to equal vocabularies within a round, and the most memory.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from programs import find_script
from rounds import find_medians, measure_anew

EQUAL = "equal"
KINDS = {EQUAL: "equal tokens", "own": "tokens of its own", "shuffled": "the same, in random order"}
PIECE = 1 << 26  # bytes of weights that are repeated


def main() -> None:
    """Measure, and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256_000)
    parser.add_argument("--own", type=int, default=4_000, help="tokens that the second has instead of the first's")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are made; else that for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        shape = options.tokens, options.width
        first, second = (write_weights(folder / f"{i}.safetensors", i, shape) for i in range(2))
        tokens = [f"word{i}" for i in range(options.tokens)]
        model = write_model(folder / "first", first, tokens, options.width)
        commands = {}
        for kind in KINDS:
            other = write_model(folder / kind, second, change_tokens(tokens, kind, options.own), options.width)
            recipe = folder / f"{kind}.yml"
            models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in (model, other)]
            asked = {"merge_method": "linear", "models": models, "dtype": "bfloat16", "tokenizer_source": "union"}
            recipe.write_text(json.dumps(asked))
            out = str(folder / "out")
            commands[kind] = [find_script("mergemill"), "merge", str(recipe), out, "--memory", "512MiB", "--quiet"]
        rounds = []
        for _ in range(options.runs):
            rounds.append({kind: measure_anew(command, [folder / "out"]) for kind, command in commands.items()})
            shutil.rmtree(folder / "out")
        for kind, title in KINDS.items():
            found = find_medians(rounds, kind, EQUAL)
            sys.stdout.write(
                f"{title}: {found.wall_s:.1f} s, {found.wall_ratio:.2f} times; {found.cpu_s:.1f} CPU s, "
                f"{found.cpu_ratio:.2f} times; {found.peak_mib} MiB\n"
            )


def change_tokens(tokens: list[str], kind: str, own: int) -> list[str]:
    """Return the second model's tokens, by id."""
    if kind == EQUAL:
        return tokens
    step = len(tokens) // own
    found = [f"own{i}" if i % step == 1 else token for i, token in enumerate(tokens)]
    if kind == "shuffled":
        random.Random(0).shuffle(found)
    return found


def write_weights(path: Path, seed: int, shape: tuple[int, int]) -> Path:
    """Write an embedding of small random numbers, that repeat."""
    size = 2 * shape[0] * shape[1]
    values = np.random.default_rng(seed).standard_normal(PIECE // 4, np.float32) * np.float32(0.02)
    piece = np.tile((values.view(np.uint32) >> 16).astype("<u2"), 2).tobytes()
    named = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": shape, "data_offsets": (0, size)}}
    header = json.dumps({"__metadata__": {"format": "pt"}, **named}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
    return path


def write_model(folder: Path, weights: Path, tokens: list[str], width: int) -> Path:
    """Write a model with these weights, and a tokenizer of whole words."""
    folder.mkdir()
    (folder / "model.safetensors").hardlink_to(weights)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 0}
    config |= {"hidden_size": width, "vocab_size": len(tokens), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


if __name__ == "__main__":
    main()
