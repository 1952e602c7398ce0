"""Sizes as people write them, beside Pydantic's own reading of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, TypeAdapter

from mergemill.engine.errors import InputError
from mergemill.engine.plan.sizes import parse_size, say_enough

UNITS = [
    "",
    "b",
    "B",
    "kB",
    "KB",
    "kib",
    "KiB",
    "MB",
    "mib",
    "GB",
    "GiB",
    "gib",
    "TB",
    "TiB",
    "PiB",
    "EB",
    "k",
    "M",
    "g",
]


@given(
    number=st.integers(1, 10**6).map(str) | st.decimals(1, 10**4, places=3).map(str) | st.just(".5"),
    space=st.sampled_from(["", " "]),
    unit=st.sampled_from(UNITS),
)
def test_a_size_is_what_pydantic_makes_of_it(number: str, space: str, unit: str) -> None:
    expected = int(TypeAdapter(ByteSize).validate_python(f"{number}{space}{unit}"))
    if expected:
        found = parse_size(f"{number}{space}{unit}", what="x")
        assert abs(found - expected) <= expected * 2**-52  # Pydantic multiplies floats


def test_many_digits_are_kept() -> None:
    assert parse_size("9007199254740993", what="x") == 9007199254740993


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "0",
        "-1",
        "0.1",
        "1e9",
        "5 GBB",
        "5ib",
        "5 gigabytes",
        "٣GB",
        "1 2",
        "5GB, 3",
        "5GB/s",
        "1.5.3",
        "1-2",
        "5Gbit",
        0,
        -4,
    ],
)
def test_what_is_no_size_is_refused_with_what_would_be_one(text: str | int) -> None:
    with pytest.raises(
        InputError, match=r"--memory: .* is not a size; write bytes, or a number with MB, GB, MiB or GiB"
    ):
        parse_size(text, what="--memory")


@pytest.mark.parametrize(
    "size_bytes", [1, 1023, 1025, 2_900_000_001, *((n << 20) // 7 + n for n in range(1, 9000, 97))]
)
def test_a_size_that_is_advised_is_enough_and_no_tenth_more(size_bytes: int) -> None:
    enough = parse_size(say_enough(size_bytes), what="--memory")
    assert size_bytes <= enough <= max(size_bytes * 1.1 + 1, 1024)
