"""What merges of quantised models cost beside the floor of the bytes truly read and written: in turn, CPU and wall.

    python tests/bench/quantized.py

Two models of the shape of 1.1B parameters (with `--layers` of its layers), whose projections are quantised: block FP8
with its scales (as DeepSeek's), MXFP4 in rows (as compressed-tensors'), MXFP4 of packed experts, which loaders turn
round (as gpt-oss's), GPTQ, and GGUF files of three types. The output is bfloat16. `--large` merges a pair of MXFP4
tensors of a billion elements under the promise `--memory`.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from checkpoints import LLAMAS, Llama, list_shapes, make_config
from programs import find_script, list_weights
from rounds import find_medians, measure_anew
from safetensors.torch import save_file

from mergemill.engine.checkpoint.gguf.families import find_family, list_settings, to_gguf_name

GGUF = {"q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}  # and where float16 scales lie in a block
KINDS = ("fp8", "mxfp4", "gpt-oss", "gptq", *GGUF)
LARGE = (64, 4096, 4096)  # experts, rows and columns, as they lie
_BLOCK, _GROUP = 128, 32


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        llama = replace(LLAMAS["1.1B"], layers=options.layers)
        for kind in options.kinds.split(","):
            ending = ".gguf" if kind in GGUF else ""
            pair = [folder / f"{kind}-{options.layers}-{number}{ending}" for number in range(2)]
            for number, model in enumerate(pair):
                if not model.exists():
                    write_model(model, kind, llama, number)
            compare(kind, pair, count_elements(llama, kind), folder, options.memory, options.runs)
        if options.large:
            pair = [folder / f"large-{number}" for number in range(2)]
            for number, model in enumerate(pair):
                write_experts(model, {"model.layers.0.mlp.experts.down_proj": LARGE}, {}, number)
            compare("a billion elements", pair, math.prod(LARGE), folder, options.memory, 1, "--raw")


def compare(title: str, pair: Sequence[Path], elements: int, folder: Path, memory: str, runs: int, *more: str) -> None:
    """Run floor and merge in turn; print a row."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in pair]
    recipe, out = folder / "recipe.yml", folder / "out"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": entries, "dtype": "bfloat16"}))
    sources = [str(file) for model in pair for file in (list_weights(model) if model.is_dir() else [model])]
    floor = [sys.executable, "-S", "-E", str(Path(__file__).with_name("floor.py")), "after", str(out)]
    merge = [find_script("mergemill"), "merge", str(recipe), str(out), "--quiet", "--memory", memory, *more]
    commands = {"floor": [*floor, str(2 * elements), *sources], "mergemill": merge}
    rounds = [{name: measure_anew(command, [out]) for name, command in commands.items()} for _ in range(runs)]
    first, of = (find_medians(rounds, name, "floor") for name in commands)
    numbers = " | ".join(f"{each:.1f}" for each in (first.cpu_s, first.wall_s, of.cpu_s, of.wall_s))
    sys.stdout.write(f"| {title} | {numbers} | {of.wall_ratio:.2f}, {of.cpu_ratio:.2f} | {of.peak_mib} |\n")
    sys.stdout.flush()


def count_elements(llama: Llama, kind: str) -> int:
    """Return the elements of the output."""
    return sum(map(math.prod, (gather_experts(llama) if kind == "gpt-oss" else list_shapes(llama)).values()))


def gather_experts(llama: Llama) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes with the projections of each layer's MLP as two stacks of experts."""
    shapes = {name: shape for name, shape in list_shapes(llama).items() if ".mlp." not in name}
    for i in range(llama.layers):
        experts = f"model.layers.{i}.mlp.experts"
        shapes[f"{experts}.gate_up_proj"] = (4, llama.intermediate // 2, llama.hidden)
        shapes[f"{experts}.down_proj"] = (4, llama.hidden, llama.intermediate // 4)
    return shapes


def write_model(folder: Path, kind: str, llama: Llama, number: int) -> None:
    """Write a model whose projections are quantised."""
    if kind == "gpt-oss":
        write_experts(folder, gather_experts(llama), make_config(llama), number)
        return
    if kind in GGUF:
        write_gguf(folder, kind, llama, number)
        return
    drawn, tensors = torch.Generator().manual_seed(number), {}
    for name, shape in list_shapes(llama).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = _draw(shape, drawn)
        elif kind == "fp8":
            codes = torch.randint(0, 127, shape, generator=drawn, dtype=torch.uint8)
            codes |= torch.randint(0, 2, shape, generator=drawn, dtype=torch.uint8) << 7
            tensors[name] = codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand([-(-side // _BLOCK) for side in shape], generator=drawn) * 1e-3
        elif kind == "gptq":
            tensors |= {f"{name.removesuffix('weight')}{part}": each for part, each in _draw_gptq(shape, drawn)}
        else:
            tensors |= {f"{name}{ending}": each for ending, each in _draw_mxfp4(shape, drawn)}
    more = {"fp8": {"weight_block_size": [_BLOCK] * 2}, "gptq": {"bits": 4, "group_size": _BLOCK, "desc_act": False}}
    settings = {"quant_method": kind, **more.get(kind, {})}
    _save(folder, tensors, {**make_config(llama), "quantization_config": settings})


def write_gguf(path: Path, kind: str, llama: Llama, seed: int) -> None:
    """Write a GGUF file whose matrices are of one type."""
    import gguf

    family, drawn, config = find_family("llama", where="here"), np.random.default_rng(seed), make_config(llama)
    config = {**config, "max_position_embeddings": 2048}
    type_of = gguf.GGMLQuantizationType[kind.upper()]
    elements, block_bytes = gguf.GGML_QUANT_SIZES[type_of]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in list_settings(config, family, where="here"):
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    for name, shape in list_shapes(llama).items():
        if len(shape) == 1:
            writer.add_tensor(to_gguf_name(name, family), np.ones(shape, np.float32))
            continue
        blocks = drawn.integers(0, 256, (math.prod(shape) // elements, block_bytes), np.uint8)
        for at in GGUF[kind]:
            blocks[:, at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
        writer.add_tensor(to_gguf_name(name, family), blocks.reshape(shape[0], -1), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_experts(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object], seed: int) -> None:
    """Write a model whose packed experts are MXFP4."""
    drawn, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        if len(shape) == 3:
            tensors |= {f"{name}{ending}": each for ending, each in _draw_mxfp4(shape, drawn)}
        else:
            tensors[name] = _draw(shape, drawn)
    _save(folder, tensors, {**config, "quantization_config": {"quant_method": "mxfp4"}})


def _draw(shape: Sequence[int], drawn: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=drawn) * 0.02).bfloat16()


def _draw_mxfp4(shape: Sequence[int], drawn: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    *outer, columns = shape
    blocks = (*outer, columns // _GROUP)
    yield "_blocks", torch.randint(0, 256, (*blocks, _GROUP // 2), generator=drawn, dtype=torch.uint8)
    yield "_scales", torch.randint(110, 122, blocks, generator=drawn, dtype=torch.uint8)


def _draw_gptq(shape: Sequence[int], drawn: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield words of eight inputs, of eight outputs, and scales, for a group of inputs each."""
    rows, columns = shape
    groups = columns // _BLOCK
    for name, side in (("qweight", (columns // 8, rows)), ("qzeros", (groups, rows // 8))):
        yield name, torch.randint(-(1 << 31), 1 << 31, side, generator=drawn, dtype=torch.int64).int()
    yield "scales", (torch.rand((groups, rows), generator=drawn) * 1e-3).half()


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
