"""Compare mergemill with mergekit and with the plain I/O floor, in turn, on this machine.

    MERGEMILL_MERGEKIT_PYTHON=/path/to/mergekit/venv/bin/python \
        python tests/bench/compare.py --shape 1.1B --methods linear --runs 5

Prints a Markdown table (median, minimum and maximum of the wall time, CPU seconds, peak memory over all processes) and
the ratios; ``--json FILE`` keeps every run. The floor reads the same inputs into a reused buffer and writes as many
bytes with fdatasync, nothing else. Each program runs once before it counts, so the page cache is warm.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

SHAPES = {  # hidden, layers, intermediate, rows of k and v, vocabulary
    "tiny": (256, 4, 704, 64, 4096),
    "1.1B": (2048, 22, 5632, 256, 32000),
    "8B": (4096, 32, 14336, 1024, 128256),
}
MODELS = ("base", "a", "b")
_BOTH = "models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]\n"
RECIPES = {
    "linear": "merge_method: linear\n" + _BOTH + "dtype: bfloat16\n",
    "slerp": "merge_method: slerp\nbase_model: {a}\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"
    "parameters: {{t: 0.4}}\ndtype: bfloat16\n",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {base}\n" + _BOTH + "dtype: bfloat16\n",
    "ties": "merge_method: ties\nbase_model: {base}\n" + _BOTH + "parameters: {{density: 0.5}}\ndtype: bfloat16\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: {base}\n"
    + _BOTH
    + "parameters: {{density: 0.5}}\ndtype: bfloat16\n",
}
FLOOR = """
import os, sys
buffer = memoryview(bytearray(8 << 20))
sources, target, size = sys.argv[1:-2], sys.argv[-2], int(sys.argv[-1])
for source in sources:
    file = os.open(source, os.O_RDONLY)
    while os.readv(file, [buffer]):
        pass
    os.close(file)
file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for start in range(0, size, len(buffer)):
    os.write(file, buffer[: min(len(buffer), size - start)])
os.fdatasync(file)
"""


@dataclass(frozen=True)
class Run:
    """What one run of a program took."""

    program: str
    wall_s: float
    cpu_s: float  # user and system, of the program and all its processes
    peak_bytes: int  # resident, over all its processes at once


def main() -> None:
    """Run the comparison that the command line asks for."""
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sizes = make_models(folder, options.shape)
        runs = {method: list(compare(method, folder, sizes, options)) for method in options.methods}
    sys.stdout.write(format_table(runs, options.shape) + "\n")
    if options.json:
        found = {method: [asdict(run) for run in taken] for method, taken in runs.items()}
        options.json.write_text(json.dumps({"shape": options.shape, "runs": found}, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["linear"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", default="512MiB", help="promised to mergemill")
    parser.add_argument("--folder", type=Path, default=None, help="a disk with room for four models")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def make_models(folder: Path, shape: str) -> int:
    """Write three bf16 models of a Llama shape; returns the size of one in bytes."""
    for seed, name in enumerate(MODELS):
        (folder / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.empty(dims, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for key, dims in iter_shapes(shape)
        }
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(make_config(shape)))
    return (folder / MODELS[0] / "model.safetensors").stat().st_size


def iter_shapes(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, layers, intermediate, kv_rows, vocabulary = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv_rows), ("v", kv_rows), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, intermediate)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_config(shape: str) -> dict[str, object]:
    hidden, layers, intermediate, kv_rows, vocabulary = SHAPES[shape]
    heads = hidden // 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_rows // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def compare(method: str, folder: Path, size: int, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the counted runs of all programs, in turn."""
    places = {name: str(folder / name) for name in MODELS}
    recipe = folder / f"{method}.yml"
    recipe.write_text(RECIPES[method].format(**places))
    out = folder / "out"
    used = [name for name in MODELS if places[name] in recipe.read_text()]
    sources = [str(folder / name / "model.safetensors") for name in used]
    own = str(Path(sys.executable).with_name("mergemill"))
    commands = {
        "floor": [sys.executable, "-c", FLOOR, *sources, str(folder / "floor"), str(size)],
        "mergemill": [own, "merge", str(recipe), str(out), "--quiet", "--memory", options.memory],
    }
    if python := os.environ.get("MERGEMILL_MERGEKIT_PYTHON"):
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        script = str(Path(python).with_name("mergekit-yaml"))
        commands["mergekit"] = [script, str(recipe), str(out), "--no-write-model-card", "--quiet"]
    for number in range(options.runs + 1):
        for program, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            (folder / "floor").unlink(missing_ok=True)
            os.sync()
            run = measure(program, command)
            sys.stderr.write(f"{method} {number}/{options.runs} {run}\n")
            if number:
                yield run


def measure(program: str, command: Sequence[str]) -> Run:
    """Run a command to its end; its processes' memory is sampled every 20 ms."""
    started = time.perf_counter()
    before = os.times()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    code = process.wait()
    wall_s = time.perf_counter() - started
    watcher.join()
    after = os.times()
    if code:
        raise SystemExit(f"{program} ended with {code}: {' '.join(command)}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(program, wall_s, cpu_s, peak[0])


def watch_memory(process: psutil.Popen, peak: list[int]) -> None:
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while it is looked at
            family = (process, *process.children(recursive=True))
            peak[0] = max(peak[0], sum(one.memory_info().rss for one in family))
        time.sleep(0.02)


def format_table(runs: dict[str, list[Run]], shape: str) -> str:
    lines = [
        f"| {shape}, bf16 | program | wall s: median (min–max) | CPU s | peak MiB | wall / floor | wall / mergekit |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, taken in runs.items():
        for program in dict.fromkeys(run.program for run in taken):
            own = [run for run in taken if run.program == program]
            walls = sorted(run.wall_s for run in own)
            lines.append(
                f"| {method} | {program} | {statistics.median(walls):.1f} ({walls[0]:.1f}–{walls[-1]:.1f}) "
                f"| {statistics.median(run.cpu_s for run in own):.1f} "
                f"| {max(run.peak_bytes for run in own) / 2**20:.0f} "
                f"| {ratio(taken, program, 'floor')} | {ratio(taken, program, 'mergekit')} |"
            )
    return "\n".join(lines)


def ratio(runs: Sequence[Run], program: str, other: str) -> str:
    """The median of the wall times' ratios, run by run."""
    pairs = zip(
        [run.wall_s for run in runs if run.program == program],
        [run.wall_s for run in runs if run.program == other],
        strict=False,
    )
    found = [mine / theirs for mine, theirs in pairs]
    return f"{statistics.median(found):.2f}" if found else "–"


if __name__ == "__main__":
    main()
