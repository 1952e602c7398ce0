"""Which of the small files of a model's folder an output copies as they are."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from mergemill.engine.checkpoint.checkpoint import TEMPLATES_FOLDER

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, …
    "*.tiktoken",
    "tekken.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES_FOLDER}/*.jinja")
COPIED_FILES = (
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    "generation_config.json",
    "*preprocessor_config.json",  # of images, video, audio
    "*processor_config.json",
    "normalizer.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)


def copied_files(files: Iterable[str]) -> tuple[str, ...]:
    """Return those of a donor's `files` that an output copies byte for byte.

    >>> copied_files(["README.md", "config.json", "spiece.model", "tokenizer.json", "training_args.bin"])
    ('spiece.model', 'tokenizer.json')
    """
    return tuple(name for name in files if matches(name, COPIED_FILES))


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
