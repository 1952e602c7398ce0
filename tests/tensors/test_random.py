"""Random numbers are a function of (seed, model, tensor, element), uniform, and the same for ever."""

import hashlib
from math import sqrt

import numpy as np
import pytest
import torch
from tensors.masks import random_mask, random_words

from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import keep_under_limits, keep_with_probability, random_bits, random_limits
from mergemill.engine.tensors.slabs import BLOCK

TENSOR = "model.layers.0.self_attn.q_proj.weight"
PLACE = Place(TENSOR, (4 * BLOCK,), 42, (1, 2))

# Every merge with a random method that anyone has made depends on these: they are never to change.
GOLDEN = [
    # seed, model, tensor, block, the first four numbers, the block's sha256
    (
        0,
        0,
        "a",
        0,
        [-1030178384, 684942620, -388583565, 2104566803],
        "ce4f1757fdb2a3ed0e18faf913d00a787f17ac93d8be66557f36ae4c7ce61511",
    ),
    (
        42,
        1,
        TENSOR,
        0,
        [-2053888357, -2102522639, 998283302, -1982523160],
        "f76a7fd1caa5b52c6f62873f944d7008aa91749b0f718846a323f6ce0589cff2",
    ),
    (
        42,
        2,
        TENSOR,
        1,
        [-688774297, 1132248161, -1503436208, -1391502027],
        "58c55d84d40fdf14301d3e078fa61d9dba820b56e177869a3b51bedd0d3a747a",
    ),
    (
        9223372036854775807,
        15,
        "model.embed_tokens.weight",
        4000,
        [1485876821, 1785619660, -1214742102, -560348987],
        "38a08330394c2453f46ffb7e40ff36b58bb9ac3e785f5e9d13dd351330e9b690",
    ),
    (
        7,
        0,
        "ünïcode",
        3,
        [-787466941, 1477385135, -242410192, 1028180507],
        "76f43ff4ce1ba0a1fb6b043b38bebb4edf428a46560b83ed6b02a8140fc932e1",
    ),
]


@pytest.mark.parametrize(("seed", "model", "tensor", "block", "first", "digest"), GOLDEN)
def test_numbers_are_pinned(seed: int, model: int, tensor: str, block: int, first: list[int], digest: str) -> None:
    bits = random_bits(Place(tensor, (1,), seed, (model,)), model, block)
    assert bits[:4].tolist() == first
    assert hashlib.sha256(bits.numpy().astype("<i4").tobytes()).hexdigest() == digest


def test_a_mask_is_pinned() -> None:
    mask = keep_with_probability(PLACE, 1, 0.3, torch.empty(BLOCK + 100)).bool().numpy()
    assert np.flatnonzero(mask)[:8].tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() == (
        "d136bbc407c95c33e42d035814b64136b0f5686a4ea34fd8b84dd585b86c5cbf"
    )


@pytest.mark.parametrize("block", [0, 1, 77])
def test_numbers_equal_a_second_implementation(block: int) -> None:
    words = random_words(seed=42, model=2, tensor=TENSOR, block=block)
    assert np.array_equal(random_bits(PLACE, 2, block).numpy(), words.view(np.int32))


def test_the_same_key_gives_the_same_numbers_again() -> None:
    first = random_bits(PLACE, 1, 0).clone()
    random_bits(PLACE, 2, 3)
    assert torch.equal(random_bits(PLACE, 1, 0), first)


@pytest.mark.parametrize(
    ("other", "model", "block"),
    [
        (Place(TENSOR, (4 * BLOCK,), 43, (1, 2)), 1, 0),
        (Place(TENSOR + "x", (4 * BLOCK,), 42, (1, 2)), 1, 0),
        (PLACE, 2, 0),
        (PLACE, 1, 1),
        (Place(TENSOR, (4 * BLOCK,), -42, (1, 2)), 1, 0),
        (Place(TENSOR, (4 * BLOCK,), 42 + 2**32, (1, 2)), 1, 0),
    ],
)
def test_another_key_gives_independent_numbers(other: Place, model: int, block: int) -> None:
    left = random_bits(PLACE, 1, 0).double()
    right = random_bits(other, model, block).double()
    correlation = float(torch.corrcoef(torch.stack([left, right]))[0, 1])
    assert abs(correlation) < 4.5 / sqrt(BLOCK)
    assert int((left == right).sum()) < 5


def test_neither_shape_nor_slab_is_part_of_the_key() -> None:
    reshaped = Place(TENSOR, (2, 2 * BLOCK), 42, (1,), start=2 * BLOCK)
    assert torch.equal(random_bits(reshaped, 1, 3), random_bits(PLACE, 1, 3))


def test_every_byte_is_uniform() -> None:
    words = np.concatenate([random_bits(PLACE, 1, block).numpy() for block in range(8)])
    for byte in range(4):
        counts = np.bincount(words.view(np.uint8)[byte::4], minlength=256)
        expected = len(words) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 4.5 * sqrt(2 * 255), byte


def test_every_bit_is_fair_and_independent_of_the_one_before() -> None:
    words = np.concatenate([random_bits(PLACE, 2, block).numpy().view(np.uint32) for block in range(4)])
    for bit in range(32):
        bits = (words >> np.uint32(bit)) & np.uint32(1)
        changes = bits[1:] != bits[:-1]
        for share in (bits.mean(), changes.mean()):
            assert abs(share - 0.5) < 4.5 * 0.5 / sqrt(len(words)), bit


def test_neighbouring_blocks_share_no_numbers_in_place() -> None:
    blocks = [random_bits(PLACE, 1, block) for block in range(16)]
    same = sum(int((blocks[i] == blocks[j]).sum()) for i in range(16) for j in range(i))
    assert same < 20, "120 pairs of 65,536 numbers meet by chance in about two"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("probability", [1e-9, 0.003, 0.25, 0.5, 0.999, 1 - 1e-12])
def test_what_is_kept_equals_a_second_implementation(probability: float, dtype: torch.dtype) -> None:
    size = 2 * BLOCK + 77
    mask = keep_with_probability(PLACE, 1, probability, torch.full((size,), torch.nan, dtype=dtype))
    expected = random_mask(size, probability, seed=42, model=1, tensor=TENSOR)
    assert np.array_equal(mask.numpy(), expected)


def test_a_denser_mask_holds_the_sparser_one() -> None:
    sparse, dense = (keep_with_probability(PLACE, 1, p, torch.empty(BLOCK)) for p in (0.2, 0.6))
    assert (dense >= sparse).all()


def test_any_slab_of_a_mask_is_the_same() -> None:
    whole = keep_with_probability(PLACE, 1, 0.4, torch.empty(3 * BLOCK + 5))
    for start, stop in (
        (0, BLOCK),
        (BLOCK, 3 * BLOCK),
        (2 * BLOCK, 3 * BLOCK + 5),
        (3 * BLOCK, 3 * BLOCK + 5),
    ):
        slab = keep_with_probability(PLACE.at(start), 1, 0.4, torch.empty(stop - start))
        assert torch.equal(slab, whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (5, BLOCK), (BLOCK - 1, 2 * BLOCK + 1), (100_000, 3 * BLOCK)])
def test_a_slab_may_begin_anywhere(start: int, stop: int) -> None:
    whole = keep_with_probability(PLACE, 1, 0.4, torch.empty(3 * BLOCK))
    slab = keep_with_probability(PLACE.at(start), 1, 0.4, torch.empty(stop - start))
    assert torch.equal(slab, whole[start:stop])


@pytest.mark.parametrize("start", [0, 7, BLOCK + 3])
def test_each_element_may_have_a_limit_of_its_own(start: int) -> None:
    size = BLOCK + 100
    probabilities = np.linspace(0, 1, size)
    limits = torch.from_numpy(random_limits(probabilities))
    mask = keep_under_limits(PLACE.at(start), 1, limits, torch.full((size,), torch.nan))
    padded = np.concatenate([np.zeros(start), probabilities])
    expected = random_mask(start + size, padded, seed=42, model=1, tensor=TENSOR)[start:]
    assert np.array_equal(mask.numpy(), expected)
    assert not mask[0]
