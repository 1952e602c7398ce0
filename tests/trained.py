"""Small tokenizers of each kind, trained here, and a corpus of many scripts to try them on."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = ("bytes", "sentencepiece", "unigram", "wordpiece")

SENTENCES = {
    "english": """The harbour wakes before the town. While lamps burn along the quay, the boats go out one by one.
        An old man mends his nets beside the steps; he says: "the sea keeps a ledger".  Don't you think so?
        At noon the wind turns to the west and the fishermen come home, 1,204 of them in 1987. Who counts?""",
    "code": """def join(first: dict[str, int], *others) -> list[int]:    # TODO: O(n**2)
        for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }\t\t/* fused */
        SELECT name, COUNT(*) FROM tokens WHERE id >= 32_000 GROUP BY name; -- <|nothing|>
        if __name__ == "__main__":\n\traise SystemExit(main(sys.argv[1:]) or 0x1F)""",
    "chinese": """港口比城镇先醒来。灯还在码头亮着，船一艘接一艘地出海。
        老人在台阶旁补网，他说大海记着一本账。词表合并：嵌入矩阵的每一行都属于一个词元。""",
    "arabic": """يستيقظ الميناء قبل المدينة. تخرج القوارب واحدا تلو الآخر.
        يقول الشيخ إن البحر يحفظ دفترا، ومن أخذ أكثر من نصيبه دفع الثمن.""",
    "european": """Der Hafen wacht früher auf als die Stadt; Möwen überfliegen das Kaff. Größe: 3,5 µm.
        Où vont les bateaux ? Ça dépend… naïve café, œuvre, Ångström, Łódź, ёлка, ελληνικά.""",
    "emoji": """🚀 to the 🌕, 👩‍👩‍👧‍👦 and 🏳️‍🌈! 👍🏽 ✅ ☃ ⟨ψ|φ⟩ ∑ᵢ xᵢ² ≤ ∞ 𝕋𝕠𝕜𝕖𝕟
        e\u0301 vs \u00e9, \u202eright to left\u202c, zero\u200bwidth, \ufeffmark, \ufffd""",
    "control": "a\x00b\x01c\x1b[31m \x7f tab\tbell\x07 line\r\nfeed\x0c non\u00a0breaking  double   triple    ",
}


def make_corpus() -> list[str]:
    """Return some 250 lines: each sentence, its words by themselves and in other company."""
    lines: list[str] = []
    for text in SENTENCES.values():
        sentences = [each.strip() for each in text.split("\n")]
        lines += [*sentences, text, text.upper(), text[::-1]]
        words = text.split()
        lines += [" ".join(words[i::7]) for i in range(7)]
        lines += ["".join(words[i : i + 3]) for i in range(0, len(words), 3)]
    neighbours = [*pairwise(SENTENCES.values())]
    lines += [f"{a[i * 7 : i * 7 + 40]} {b[i * 5 : i * 5 + 40]}" for i in range(12) for a, b in neighbours]
    return [line for line in lines if line]


def train(
    kind: str, texts: Sequence[str], size: int, *, added: Sequence[str] = ("<unk>", "<s>", "</s>"), **flags: bool
) -> Tokenizer:
    """Return a tokenizer of one of `KINDS`, whose special tokens are `added`, the first of them for what is unknown."""
    tokenizer, trainer = _start(kind, size, list(added))
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "sentencepiece":  # whose bytes are no added tokens
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [each for each in data["added_tokens"] if each["content"] in added]
        tokenizer = Tokenizer.from_str(json.dumps(data))
    if flags:
        tokenizer.add_tokens([AddedToken(each, **flags) for each in added])
    return tokenizer


def _start(kind: str, size: int, added: list[str]) -> tuple[Tokenizer, Any]:
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(
            vocab_size=size, special_tokens=added, initial_alphabet=alphabet, show_progress=False
        )
    if kind == "sentencepiece":  # as Llama 2 and Mistral have it
        tokenizer = Tokenizer(models.BPE(unk_token=added[0], fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        return tokenizer, trainers.BpeTrainer(
            vocab_size=size, special_tokens=added + bytes_, limit_alphabet=120, show_progress=False
        )
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer, trainers.UnigramTrainer(
            vocab_size=size, special_tokens=added, unk_token=added[0], show_progress=False
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token=added[0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=size, special_tokens=added, show_progress=False)


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write what transformers loads a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return folder
