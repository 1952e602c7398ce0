"""How far a work is, how fast and how long yet, in one line and in one system of units: binary ones, as everywhere."""

from dataclasses import dataclass

from mergemill.engine.plan.sizes import format_size, say_count

MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True, slots=True)
class Pace:
    """A state of a work."""

    done_bytes: int
    total_bytes: int
    done: int  # parts
    parts: int
    elapsed_s: float
    bytes_per_s: float = 0.0  # 0: nothing is known yet

    @property
    def share(self) -> str:
        """How much of the whole is done."""
        return f"{self.done_bytes / max(self.total_bytes, 1):4.0%}"

    @property
    def sizes(self) -> str:
        """How many bytes of how many."""
        return f"{format_size(self.done_bytes)} of {format_size(self.total_bytes)}"

    @property
    def rate(self) -> str:
        """How many bytes in a second; empty where that is not known."""
        return f"{format_size(self.bytes_per_s)}/s" if self.bytes_per_s else ""

    @property
    def counts(self) -> str:
        """How many parts of how many."""
        return f"{self.done:,} of {say_count(self.parts, 'part')}"

    @property
    def elapsed(self) -> str:
        """Since when."""
        return f"since {format_time(self.elapsed_s)}"

    @property
    def left(self) -> str:
        """How long the rest may take; empty where that is not known."""
        if not self.bytes_per_s:
            return ""
        return f"{format_time((self.total_bytes - self.done_bytes) / self.bytes_per_s)} left"

    def __str__(self) -> str:
        """All of it, as a line."""
        said = (self.sizes, self.rate, self.counts, self.elapsed, self.left)
        return f"{self.share}  {', '.join(filter(None, said))}"


def format_time(seconds: float) -> str:
    """Return a time in one or two units.

    >>> format_time(42.4), format_time(125), format_time(7380)
    ('42 s', '2 min 5 s', '2 h 3 min')
    """
    whole_s = round(seconds)
    if whole_s < MINUTE_S:
        return f"{whole_s} s"
    if whole_s < HOUR_S:
        return f"{whole_s // MINUTE_S} min {whole_s % MINUTE_S} s"
    return f"{whole_s // HOUR_S} h {whole_s % HOUR_S // MINUTE_S} min"
