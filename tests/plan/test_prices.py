"""The table of prices: every number has a date and a source, and what has no price says so."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from mergemill.engine.plan.prices import GB, find_price

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "configs" / "prices.json").read_text("utf-8"))


def test_the_table_is_shipped() -> None:
    assert json.loads(resources.files("mergemill.configs").joinpath("prices.json").read_text("utf-8")) == TABLE


@pytest.mark.parametrize("store", TABLE["stores"], ids=lambda store: store["schemes"][0])
def test_every_price_has_a_date_and_a_source(store: dict[str, object]) -> None:
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", str(store["date"]))
    assert str(store["source"]).startswith("https://")
    numbers = {name: value for name, value in store.items() if name.endswith(("_gb", "_1000"))}
    assert len(numbers) == 3
    assert all(isinstance(value, int | float) and 0 <= value < 1 for value in numbers.values())


def test_every_scheme_is_there_once() -> None:
    schemes = [scheme for store in TABLE["stores"] for scheme in store["schemes"]]
    assert len(schemes) == len(set(schemes))
    assert {"s3", "gs", "az", "hf"} <= set(schemes)


@pytest.mark.parametrize("url", ["/models/a", "models/a", "file:///a", "https://host/a", "sftp://host/a", "memory://a"])
def test_what_has_no_known_price_has_none(url: str) -> None:
    assert find_price(url) is None


def test_a_terabyte_out_of_s3() -> None:
    price = find_price("s3://bucket/model")
    assert price is not None
    assert price.of_egress(1024 * GB) == pytest.approx(92.16)
    assert price.of_requests(1_000_000, 10_000) == pytest.approx(0.45)
