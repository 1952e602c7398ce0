"""Prompts as token ids, by a model's own ``tokenizer.json``: each alone, and no special tokens but BOS before it."""

from collections.abc import Sequence
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.forward.installed import EXTRA


def tokenize(tokenizer_json: bytes, bos: str, prompts: Sequence[str], *, where: str) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt after the text of `bos`, which may be empty.

    Raises `PlanError` for a prompt of which the tokenizer knows no token, and without tokenizers.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PlanError(f"{where}: prompts need tokenizers, which is not installed; install {EXTRA}") from error
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:
        raise PlanError(f"{where}: the base model's tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = tokenizer.token_to_id(unknown) if unknown else None
    return [_tokenize(tokenizer, bos, prompt, unknown_id, where) for prompt in prompts]


def _tokenize(tokenizer: Any, bos: str, prompt: str, unknown_id: int | None, where: str) -> tuple[int, ...]:
    alone = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not set(alone) - {unknown_id}:
        raise PlanError(f"{where}: the base model's tokenizer knows no token of the prompt {prompt[:60]!r}")
    return tuple(tokenizer.encode(bos + prompt, add_special_tokens=False).ids) if bos else tuple(alone)
