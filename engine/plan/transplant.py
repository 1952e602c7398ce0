"""A model with the tokenizer of another: a planner whose embedding and head are built, and whose rest is copied.

Source: arXiv:2506.06607. A token that both have keeps the model's row; of the others the rows are made, as
`engine/transplants` has it. The donor's rows only show which tokens are like which.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from mergemill.engine.checkpoint.terms import read_terms, warn_of_terms
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.draft import SHARD_SIZE, Draft, finish
from mergemill.engine.plan.transplant_files import make_transplant_files
from mergemill.engine.plan.transplant_options import TransplantOptions, parse_options
from mergemill.engine.plan.transplant_pair import Pair, VocabularyTensor, find_rotary, open_pair
from mergemill.engine.plan.transplant_rows import Fate, Sides, count_fates, find_fates, make_rows
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SourceUse
from mergemill.engine.tensors.rows import map_rows
from mergemill.engine.tokens.matching import Matches, match_tokens
from mergemill.engine.transplants.matrices import Matrices
from mergemill.engine.transplants.methods import METHODS, Manner
from mergemill.engine.transplants.transplanted import transplant

KIND = "transplant"
MOST_ROWS = 1 << 24  # far more than any vocabulary has, and what a slip would take all memory for
Storage = Mapping[str, Mapping[str, Any]] | None


def make_transplant_plan(
    model: str,
    donor: str,
    *,
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    storage: Storage = None,
    **options: Any,
) -> Plan:
    """Plan `model` with the tokenizer of `donor`; options: those of `TransplantOptions`. Raises `InputError`."""
    value = {"model": model, "donor": donor, **asdict(parse_options(options))}
    if not value["skip_under_trained"]:
        del value["skip_under_trained"]  # as before it was there
    text = json.dumps({KIND: value}, indent=2, ensure_ascii=False) + "\n"
    return plan_transplant(Origin(KIND, "", value, text, seed=seed), shard_size, storage)


def plan_transplant(origin: Origin, shard_size: str | int, storage: Storage = None) -> Plan:
    """Return the plan of an origin, whose text says what was asked for."""
    value: dict[str, Any] = json.loads(origin.text)[KIND] if origin.text else dict(origin.value)
    options = parse_options({key: each for key, each in value.items() if key not in ("model", "donor")})
    pair = open_pair(value["model"], value["donor"], storage or {})
    if options.skip_under_trained:
        pair = find_bad_of(pair)
    title = f"{METHODS[options.method].title} for another tokenizer"
    return finish(_draft(pair, options, replace(origin, value=value, title=title)), shard_size)


def list_transplanted(
    model: str, donor: str, storage: Storage = None, **options: Any
) -> Iterator[tuple[int, str, Fate, str]]:
    """Yield what becomes of each token of the donor in the embedding: its id, itself, its fate, the model's token."""
    pair, asked = open_pair(model, donor, storage or {}), parse_options(options)
    if asked.skip_under_trained:
        pair = find_bad_of(pair)
    _, sides, fates = _match(pair, pair.sites[0], asked)
    names = {number: token for token, number in sides.donor.ids.items()}
    own = {number: token for token, number in sides.model.ids.items()}
    yield from ((number, names[number], fate, own.get(fate.row, "")) for number, fate in fates.items())


def find_bad_of(pair: Pair) -> Pair:
    """Return the pair with the rows that were hardly trained, of both."""
    from mergemill.engine.plan.under_trained_tokens import find_bad  # which reads weights

    return replace(
        pair,
        model_bad=find_bad(pair.model, pair.model_vocabulary, pair.model_places.embedding, pair.model_places.head),
        donor_bad=find_bad(pair.donor, pair.donor_vocabulary, pair.donor_places.embedding, pair.donor_places.head),
    )


def _draft(pair: Pair, options: TransplantOptions, origin: Origin) -> Draft:
    sites = {site.name: site for site in pair.sites}
    tensors = [
        _transplant(pair, sites[name], options, origin.seed)
        if name in sites
        else OutputTensor(name, offer.dtype, offer.expression)
        for name, offer in pair.offers.items()
    ]
    matches, sides, fates = _match(pair, pair.sites[0], options)
    return Draft(
        origin=origin,
        tensors=tensors,
        files=make_transplant_files(pair.model, pair.donor, sides.rows, origin.text, options.method, tensors),
        sources=_list_sources(pair, options),
        donor=f"{pair.model.ref} and {pair.donor.ref}; of {len(fates):,} tokens {count_fates(fates)}",
        dtype_from=f"those of {pair.model.ref}",
        warnings=(*_warn(pair, options, matches, sides, fates),),
    )


def _transplant(pair: Pair, site: VocabularyTensor, options: TransplantOptions, seed: int) -> OutputTensor:
    """Return a vocabulary's tensor with the donor's rows."""
    method = METHODS[options.method]
    matches, sides, fates = _match(pair, site, options)
    spelt = options.method == "subword" and not site.is_bias
    outcome = make_rows(sides, matches, fates, spelt=spelt, where=pair.model.path)
    model, changes = site.model.expression, outcome.changes
    copied = map_rows((model,), outcome.copied, model.dtype)
    if site.is_bias or not (len(changes.new) or len(changes.means)):
        return OutputTensor(site.name, model.dtype, copied)
    asked = Manner(
        options.method,
        site.name,
        min(options.k, max(1, len(changes.donors))),
        options.metric,
        options.weights,
        options.subword,
        site.is_head,
        options.noise,
        options.scale,
        seed,
        find_rotary(pair) if options.method == "mp_rope" else None,
    )
    donor = site.donor.expression if site.donor and (method.takes_targets or method.sums == "pairs") else None
    return OutputTensor(site.name, model.dtype, transplant(copied, Matrices(model, donor, changes), asked))


def _match(pair: Pair, site: VocabularyTensor, options: TransplantOptions) -> tuple[Matches, Sides, Mapping[int, Fate]]:
    """Return which tokens are the same, both vocabularies as far as there are rows, and what becomes of each token."""
    model_rows = site.model.shape[0]
    donor_rows = site.donor.shape[0] if site.donor else pair.sites[0].donor_rows
    model, donor = pair.model_vocabulary.within(model_rows), pair.donor_vocabulary
    rows = donor_rows if options.rows == "donor" else donor.size
    each = options.pad_to_multiple_of
    if rows > MOST_ROWS:
        raise PlanError(f"{pair.donor.path}: has a token of the id {rows - 1}; a matrix has {MOST_ROWS} rows at most")
    sides = Sides(model, donor, model_rows, donor_rows, -(-rows // each) * each, pair.model_bad, pair.donor_bad)
    matches = match_tokens(donor, model, options.match)
    taken = "lm_head" if site.is_head else "embed"
    fates = find_fates(
        sides,
        matches,
        byte=options.byte_match in ("yes", taken),
        prefix=options.prefix_match in ("yes", taken),
    )
    return matches, sides, fates


def _list_sources(pair: Pair, options: TransplantOptions) -> list[SourceUse]:
    sites = {site.name for site in pair.sites}
    looked = METHODS[options.method].takes_targets
    shown = {name for site in pair.sites if site.donor and looked for name in site.donor.uses}
    model, donor = pair.model, pair.donor
    return [
        SourceUse(
            model.ref,
            model.path,
            len(model.tensors),
            len(sites),
            len(model.tensors) - len(sites),
            {},
            sum(each.nbytes for each in model.tensors.values()),
        ),
        SourceUse(
            donor.ref,
            donor.path,
            len(donor.tensors),
            len(shown),
            0,
            {"of which only the tokenizer is wanted": len(donor.tensors) - len(shown)},
            sum(donor.tensors[name].nbytes for name in shown),
        ),
    ]


def _warn(
    pair: Pair, options: TransplantOptions, matches: Matches, sides: Sides, fates: Mapping[int, Fate]
) -> Iterator[str]:
    """Yield what is worth knowing before; `PlanError` where nothing can be made of what both have."""
    where, shared = f"transplant of {pair.donor.ref} into {pair.model.ref}", len(matches.shared)
    method = METHODS[options.method]
    if method.takes_targets and not shared and any(fate.kind == "approximated" for fate in fates.values()):
        raise PlanError(
            f"{where}: no token is in both, so {options.method} has nothing to go by; --method mean, subword or "
            "john_hewitt needs none"
        )
    if method.uses_k and options.k > shared:
        yield f"{where}: k is {options.k}, and only {shared:,} tokens are in both: it is taken for {shared:,}"
    zeros = [number for number, fate in fates.items() if fate.kind == "zero"]
    if zeros:
        yield f"{where}: {len(zeros):,} tokens of {pair.donor.ref} have no row; they get zeros, from id {zeros[0]}"
    if options.skip_under_trained:
        yield (
            f"{where}: of {pair.model.ref} {len(sides.model_bad):,} rows, and of {pair.donor.ref} "
            f"{len(sides.donor_bad):,} are under-trained or of no token; nothing is made of them"
        )
    if options.rows == "donor" and sides.donor.size > sides.rows:
        lost = sides.donor.size - sides.rows
        yield f"{where}: {lost:,} tokens of {pair.donor.ref} have ids past its rows, and no row here; --rows tokens"
    for site in pair.sites:
        if site.donor is None and not site.is_bias:
            yield f"{where}: {site.name}: {pair.donor.ref} has no such tensor"
    yield from warn_of_terms({each.ref: read_terms(each) for each in (pair.model, pair.donor)}, where=where)
