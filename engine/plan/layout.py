"""The layout: which tensor lies in which shard, at which byte, and how shards are cut into parts.

Nothing here depends on the cluster or on memory, so a merge can be resumed with other workers.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mergemill.engine.checkpoint.layout import TensorInfo, file_order, make_header
from mergemill.engine.plan.memory import Known, find_likeness, make_piece, project, reads_remotely
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import OutputTensor, Part, Piece, Shard
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.slabs import Span, cut_evenly

PART_BYTES = 128 << 20  # the most that a part is cut to
LEAST_PART_BYTES = 5 << 20  # and S3 takes no smaller ones, but for an object's last
WHOLE_BYTES = 64 << 20  # up to here no tensor is cut that must be known whole first: its pieces read for every pass
PARTS = 64  # parts of a merge too small for full ones, so that a few cores are busy to the end
METADATA = {"format": "pt"}
_NUMBER = re.compile("([0-9]+)")

Infos = Mapping[int, TensorInfo]  # what a tensor would be called as one, by the identity of what is written
Order = tuple[tuple[int, str, str], ...]
LayOut = Callable[  # of tensors, of which some may lie elsewhere than on this machine, or none does
    [Sequence[OutputTensor], str | int, Callable[[int, int], str], bool], tuple[tuple[Shard, ...], tuple[Part, ...]]
]


def natural_order(name: str) -> Order:
    """Return a key that sorts ``layers.2`` before ``layers.10``.

    A number is compared by its digits, since those in the name of a tensor may be more than fit an integer.

    >>> sorted(["h.10.a", "h.9.b", "h.09.b", "e"], key=natural_order)
    ['e', 'h.09.b', 'h.9.b', 'h.10.a']
    """
    words = _NUMBER.split(name)  # text and numbers in turn
    return tuple(map(_order_word, words))


@functools.lru_cache(1 << 16)  # a model's names are made of few words
def _order_word(word: str) -> tuple[int, str, str]:
    digits = word.lstrip("0")
    return (1 + len(digits), digits, word) if "0" <= word[:1] <= "9" else (0, "", word)


def number_shard(place: int, count: int) -> str:
    """Return the name of a shard as transformers numbers them.

    >>> number_shard(0, 2)
    'model-00001-of-00002.safetensors'
    """
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def make_layout(
    tensors: Sequence[OutputTensor],
    shard_size: str | int,
    name_shard: Callable[[int, int], str] = number_shard,
    remote: bool = True,
) -> tuple[tuple[Shard, ...], tuple[Part, ...]]:
    """Return the shards, and the parts of all shards in order; `tensors` are in the order of the model.

    remote: whether one of them may read what lies elsewhere than on this machine.
    """
    infos = {id(tensor): _info(tensor) for tensor in tensors}
    groups = [_in_file_order(group, infos) for group in _group(tensors, shard_size, infos)]
    names = _name_groups(groups, name_shard)
    shards = tuple(_make_shard(group, name, infos) for group, name in zip(groups, names, strict=True))
    part_bytes = choose_part_bytes(sum(shard.size_bytes for shard in shards))
    parts: list[Part] = []
    known: Known = {}
    for i, (group, shard) in enumerate(zip(groups, shards, strict=True)):
        parts.extend(cut_shard(group, len(shard.header), i, part_bytes, len(parts), known, remote))
    return shards, tuple(parts)


def choose_part_bytes(total_bytes: int) -> int:
    """Return the size that parts are cut to.

    >>> choose_part_bytes(10**6) >> 20, choose_part_bytes(2 * 10**9) >> 20, choose_part_bytes(10**12) >> 20
    (5, 29, 128)
    """
    return min(PART_BYTES, max(LEAST_PART_BYTES, total_bytes // PARTS))


def number_file(stem: str, place: int, count: int) -> str:
    """Return the name of a shard of a component, as diffusers and transformers call it.

    >>> number_file("vae/model", 0, 1), number_file("unet/diffusion_pytorch_model", 1, 2)
    ('vae/model.safetensors', 'unet/diffusion_pytorch_model-00002-of-00002.safetensors')
    """
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{place + 1:05d}-of-{count:05d}.safetensors"


def _name_groups(groups: Sequence[Sequence[OutputTensor]], name_shard: Callable[[int, int], str]) -> list[str]:
    """Return the name of each shard; those in folders are numbered by themselves."""
    stems = [group[0].stem for group in groups]
    counts = Counter(stems)
    places = [stems[:i].count(stem) for i, stem in enumerate(stems)]
    return [
        number_file(stem, place, counts[stem]) if stem else name_shard(place, counts[stem])
        for stem, place in zip(stems, places, strict=True)
    ]


def _group(tensors: Iterable[OutputTensor], shard_size: str | int, infos: Infos) -> list[list[OutputTensor]]:
    """Fill shards one after the other, of one folder each; with ``tensor`` each tensor is a shard."""
    most = 0 if shard_size == "tensor" else parse_size(shard_size, what="--shard-size")
    groups: list[list[OutputTensor]] = []
    filled = 0
    for tensor in tensors:
        size_bytes = infos[id(tensor)].nbytes
        if not groups or filled + size_bytes > most or groups[-1][0].stem != tensor.stem:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size_bytes
    return groups


def _info(tensor: OutputTensor) -> TensorInfo:
    return TensorInfo(tensor.stored_name, tensor.dtype, tensor.expression.shape)


def _in_file_order(group: Sequence[OutputTensor], infos: Infos) -> list[OutputTensor]:
    """Order as `save_file` does; what is stored in several dtypes comes first, so that all of it is aligned."""
    mixed = [each for each in group if each.stored_as and len({info.dtype for info in each.stored_as}) > 1]
    if mixed:
        others = [tensor for tensor in group if tensor not in mixed]
        return [*sorted(mixed, key=lambda tensor: tensor.stored_name), *_in_file_order(others, infos)]
    by_name = {infos[id(tensor)].name: tensor for tensor in group}
    return [by_name[info.name] for info in file_order([infos[id(tensor)] for tensor in group])]


def _make_shard(group: Sequence[OutputTensor], name: str, infos: Infos) -> Shard:
    stored = [info for tensor in group for info in tensor.stored_as or (infos[id(tensor)],)]
    header = make_header(stored, METADATA)
    size_bytes = len(header) + sum([info.nbytes for info in stored])
    return Shard(name, header, size_bytes, tuple([info.name for info in stored]))


def cut_shard(
    group: Sequence[OutputTensor],
    start_bytes: int,
    shard: int,
    part_bytes: int,
    first: int,
    known: Known,
    remote: bool = True,
) -> Iterator[Part]:
    """Glue pieces until a part is full, or as large as it must be; a tensor larger than a part is cut evenly."""
    held: list[Piece] = []
    start_of_part = end_of_part = start_bytes
    for piece in _cut_tensors(group, start_bytes, part_bytes, known, remote):
        end = _end(piece)
        full = end_of_part - start_of_part >= LEAST_PART_BYTES and end - start_of_part > part_bytes
        if full and not _are_made_together(held[-1], piece):
            yield _make_part(held, shard, first)
            first, held, start_of_part = first + 1, [], piece.offset_bytes
        held.append(piece)
        end_of_part = end
    if held:
        yield _make_part(held, shard, first)


def _are_made_together(one: Piece, other: Piece) -> bool:
    made_with = one.tensor.expression.made_with
    return made_with is not None and made_with is other.tensor.expression.made_with


def _cut_tensors(
    group: Sequence[OutputTensor], offset_bytes: int, part_bytes: int, known: Known, some_remote: bool
) -> Iterator[Piece]:
    for tensor in group:
        likeness = find_likeness(tensor)
        cuts = known.get(likeness) if likeness is not None else None
        if cuts is None:
            cuts = [(span, project(tensor, span)) for span in _cut(tensor, part_bytes)]
            if likeness is not None:
                known[likeness] = cuts
        whole, item = len(cuts) == 1, item_bytes(tensor.dtype)
        remote = (
            some_remote and bool(cuts) and reads_remotely(tensor.expression)
        )  # a stack of experts has hundreds of inputs
        for span, projected in cuts:
            yield make_piece(tensor, span, offset_bytes + span.start * item, projected, whole=whole, remote=remote)
        if cuts:
            offset_bytes += cuts[-1][0].stop * item


def _cut(tensor: OutputTensor, part_bytes: int) -> list[Span]:
    """Return the spans that a tensor is cut into: none, where it has no bytes; the header says all there is."""
    item, size = item_bytes(tensor.dtype), tensor.expression.size
    if size == 0:
        return []
    most_bytes = part_bytes
    if size * item > part_bytes and tensor.expression.count_rounds()[1]:
        most_bytes = max(part_bytes, min(WHOLE_BYTES, PART_BYTES))
    block = tensor.expression.block
    grain = math.lcm(block, tensor.expression.grain)
    fits = grain * item <= 2 * PART_BYTES  # else pieces read again what they share
    return cut_evenly(size, most_bytes // item, grain if fits else block)


def _end(piece: Piece) -> int:
    return piece.offset_bytes + piece.span.size * item_bytes(piece.tensor.dtype)


def _make_part(pieces: Sequence[Piece], shard: int, number: int) -> Part:
    return Part(number, shard, pieces[0].offset_bytes, _end(pieces[-1]), tuple(pieces))
