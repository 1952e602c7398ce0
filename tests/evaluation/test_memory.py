"""What judging takes of memory, of a model that is eight times larger than that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation.families import TEXT
from models import make_config, write_json, write_tokenizer
from runs.large import write_repeated

HIDDEN, WIDE, LAYERS = 768, 3072, 65
PROMISED = 144 << 20

MEASURE = """
import os, sys
from pathlib import Path
from runs.memory import peak_bytes, reset_peak
from mergemill.engine import evaluate
from mergemill.engine.search.searches import TextSource
source = TextSource(text="text.txt", window=64, windows=2)
evaluate("small", source)  # loads transformers
_, before = reset_peak()
found = evaluate("large", source, memory=int(sys.argv[1]))
print(peak_bytes(os.getpid()) - before, found.bytes_read, found.nll)
"""


def write_deep(folder: Path, layers: int) -> int:
    """Write a Llama of random values that repeat every 64 MiB, with a tokenizer; return the bytes of its tensors."""
    square, wide = (HIDDEN, HIDDEN), (WIDE, HIDDEN)
    shapes = {
        "model.embed_tokens.weight": (256, HIDDEN),
        "lm_head.weight": (256, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": wide for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": wide[::-1]}
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    stored_bytes = write_repeated(folder, shapes, 0)
    sizes = {"layers": layers, "hidden": HIDDEN, "heads": 8, "kv_heads": 8, "intermediate": WIDE, "vocab": 256}
    given = make_config(**sizes, tied=False, dtype="bfloat16")
    write_json(folder / "config.json", given)
    write_tokenizer(folder, size=256)
    return stored_bytes


@pytest.mark.slow
def test_a_model_eight_times_larger_than_the_promise_is_judged_within_it(tmp_path: Path) -> None:
    write_deep(tmp_path / "small", 1)
    stored = write_deep(tmp_path / "large", LAYERS)
    (tmp_path / "text.txt").write_text(TEXT)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(PROMISED)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, read, _ = map(float, done.stdout.split())
    assert stored == read > 8 * PROMISED
    assert peak <= PROMISED
