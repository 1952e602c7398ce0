"""What is told of tokens before a merge: ids that differ, roles that files see differently, chats without an end."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint, digest_file, read_file
from mergemill.engine.checkpoint.vocabulary import is_same_pin, may_be_same, read_object, read_vocabulary
from mergemill.engine.errors import CheckpointError
from mergemill.engine.plan.renumbering import Renumbering
from mergemill.engine.plan.tokenizer_files import GENERATION_NAME, TEMPLATE_NAME, TokenizerFiles
from mergemill.engine.plan.values import SmallFile
from mergemill.engine.tokens.reading import ROLES, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, find_role
from mergemill.engine.tokens.templates import find_stop, list_special, read_template

MOST_AT_ONCE = 8  # tokenizers that are read


def warn_of_ids(donor: Checkpoint, checkpoints: Mapping[str, Checkpoint], *, where: str) -> Iterator[str]:
    """Yield a warning for each model that gives ids to other tokens than the donor: their rows would be mixed up."""
    others = {model: each for model, each in checkpoints.items() if model != donor.ref}
    for model, other in _leave_out_same(donor, others).items():
        try:
            own, its = read_vocabulary(donor), read_vocabulary(other)
        except CheckpointError as error:
            yield f"{where}: the tokenizers of {donor.ref} and {model} cannot be compared: {error}"
            continue
        if own is None or its is None or own == its:
            continue
        mine, theirs = ({number: token for token, number in each.items()} for each in (own, its))
        numbers = [number for number in sorted({*mine, *theirs}) if mine.get(number) != theirs.get(number)]
        first = numbers[0]
        yield (
            f"{where}: {len(numbers):,} ids are other tokens in {model} than in {donor.ref} (the first, {first}: "
            f"{_show(theirs.get(first))}, {_show(mine.get(first))}), and rows are merged by id; "
            f"'tokenizer_source: union' (or base) merges them by token"
        )


def _leave_out_same(donor: Checkpoint, others: Mapping[str, Checkpoint]) -> Mapping[str, Checkpoint]:
    """Return the models whose tokenizer is not the donor's file; of remote ones, all are read at once."""
    near = {model: each for model, each in others.items() if may_be_same(donor, each, TOKENIZER_NAME)}
    asked = [each for each in near.values() if not is_same_pin(donor, each, TOKENIZER_NAME)]
    if not asked:
        return {model: each for model, each in others.items() if model not in near}
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        own, *its = pool.map(lambda each: digest_file(each, TOKENIZER_NAME), (donor, *asked))
    same = {each.ref for each, digest in zip(asked, its, strict=True) if digest == own}
    same |= {each.ref for each in near.values() if is_same_pin(donor, each, TOKENIZER_NAME)}
    return {model: each for model, each in others.items() if each.ref not in same}


def warn_of_files(
    files: Sequence[SmallFile],
    written: TokenizerFiles,
    donor: Checkpoint,
    renumbering: Renumbering | None,
    *,
    where: str,
) -> Iterator[str]:
    """Yield what the output's small files say of tokens and do not agree on."""
    made = {file.name: file.data for file in files if file.data is not None}
    config = _read(made, written.source, TOKENIZER_CONFIG_NAME)
    ids = list_ids(config) if renumbering is None else renumbering.joined.ids
    said = {name: _read(made, donor, name) for name in (CONFIG_NAME, GENERATION_NAME)}
    roles = {role: ids[token] for role in ROLES if (token := find_role(config, role)) in ids}
    for name, each in said.items():
        yield from _warn_of_roles(each, name, roles, where)
    template = find_template(written.source, made.get(TEMPLATE_NAME), config)
    if template is None:
        return
    lacking = [token for token in list_special(template) if token not in ids]
    if lacking and (renumbering is not None or made.get(TEMPLATE_NAME)):
        yield (
            f"{where}: the chat template writes {', '.join(map(repr, lacking))}, which the vocabulary has not as one "
            f"token; 'tokenizer: {{tokens: {{{json.dumps(lacking[0])}: {{}}}}}}' adds it"
        )
    yield from _warn_of_stop(find_stop(template), ids, said, where)


def find_template(source: Checkpoint, made: bytes | None, config: Mapping[str, Any]) -> str | None:
    """Return the chat template of a model, or of an output for which one is `made`."""
    if made is not None:
        return made.decode()
    if TEMPLATE_NAME in source.files:
        return read_file(source, TEMPLATE_NAME).decode("utf-8", "replace")
    return read_template(config)


def list_ids(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the ids of added tokens that a ``tokenizer_config.json`` lists, without a look at the vocabulary."""
    decoder = config.get("added_tokens_decoder")
    found = decoder.items() if isinstance(decoder, dict) else ()
    return {str(each.get("content")): int(i) for i, each in found if isinstance(each, dict) and i.isdecimal()}


def _warn_of_roles(config: Mapping[str, Any], name: str, roles: Mapping[str, int], where: str) -> Iterator[str]:
    for role, number in roles.items():
        said = config.get(f"{role}_token_id")
        if said is not None and number not in (said if isinstance(said, list) else [said]):
            yield (
                f"{where}: {name} says {role}_token_id {said}, the tokenizer gives {role} the id {number}; one of the "
                f"two is wrong, as in the model that they come from"
            )


def _warn_of_stop(
    stop: str | None, ids: Mapping[str, int], said: Mapping[str, Mapping[str, Any]], where: str
) -> Iterator[str]:
    """Yield a warning where generation goes on after the token that ends a turn."""
    number = None if stop is None else ids.get(stop)
    eos = next(
        (each["eos_token_id"] for each in (said[GENERATION_NAME], said[CONFIG_NAME]) if "eos_token_id" in each), None
    )
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if number is not None and number not in stops:
        yield (
            f"{where}: the chat template ends a turn with {stop!r}, whose id {number} is no eos of {GENERATION_NAME} "
            f'({eos}): generation would go on; "eos_token_id": {json.dumps([*stops, number])} there mends it'
        )


def _read(made: Mapping[str, bytes], model: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return one of the output's small files: as it is made, or as a model has it."""
    if name in made:
        found = json.loads(made[name])
        return found if isinstance(found, dict) else {}
    try:
        return read_object(model, name) if name in model.files else {}
    except CheckpointError:
        return {}  # of which no more is asked than what it says


def _show(token: str | None) -> str:
    return "no token" if token is None else repr(token[:40])
