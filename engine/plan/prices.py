"""What object storage costs by its price list, for estimates: a small table, ``configs/prices.json``, with its sources.

An estimate is no bill: region, class, volume, discounts and free allowances differ, and so does what stands behind an
``s3://`` that is not Amazon's.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

GB = 1 << 30


@dataclass(frozen=True, slots=True)
class Price:
    """List prices of one store, in US dollars."""

    name: str  # the service, its class and region
    egress_per_gb: float  # of bytes that leave the region; within it they are free
    read_per_1000: float  # requests
    write_per_1000: float
    date: str  # of the prices: year and month
    source: str  # the URL of the price list

    def of_egress(self, size_bytes: int) -> float:
        """Return what bytes cost that leave the region."""
        return self.egress_per_gb * size_bytes / GB

    def of_requests(self, reads: int, writes: int) -> float:
        """Return what requests cost."""
        return (self.read_per_1000 * reads + self.write_per_1000 * writes) / 1000


def find_price(url: str) -> Price | None:
    """Return the prices of the store that a URL belongs to; None where they are not known, or it is none.

    >>> find_price("https://host/model"), find_price("/models/a")
    (None, None)
    >>> find_price("s3://bucket/out").of_egress(100 * GB)
    9.0
    """
    return _load().get(url.partition("://")[0]) if "://" in url else None


@functools.cache
def _load() -> Mapping[str, Price]:
    """Return the prices by scheme."""
    table = json.loads(resources.files("mergemill.configs").joinpath("prices.json").read_text("utf-8"))
    return {scheme: Price(**store) for store in table["stores"] for scheme in store.pop("schemes")}
