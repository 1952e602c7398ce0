"""A claim: one sentence about a method that running it can refute."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mergemill.engine.conformance.mill import Mill
from mergemill.engine.conformance.subject import Subject

Check = Callable[..., None]  # given a mill, a subject and a case; an AssertionError refutes the claim
Cases = Callable[[Subject], Iterable[tuple[str, tuple[Any, ...]]]]  # each with its name


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim about one method, in one case."""

    text: str
    run: Callable[[Mill], None]

    def __str__(self) -> str:
        return self.text


def iter_claims(subject: Subject, checks: Iterable[tuple[Check, Cases]]) -> Iterator[Claim]:
    """Yield a claim for each check and case; the text is the check's name and the case."""
    for check, cases in checks:
        for name, case in cases(subject):
            text = check.__name__.replace("_", " ") + (f": {name}" if name else "")
            yield Claim(text, functools.partial(_run, check, subject, case))


def _run(check: Check, subject: Subject, case: tuple[Any, ...], mill: Mill) -> None:
    check(mill, subject, *case)


def once(subject: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """One case for every method."""
    yield "", ()


def variants(subject: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """A case for each variant of the settings."""
    for i, settings in enumerate(subject.variants):
        yield f"variant {i}", (settings,)


def each(*cases: Any) -> Cases:
    """The same cases for every method."""
    return lambda subject: ((str(case), (case,)) for case in cases)


def product(*sources: Cases) -> Cases:
    """Every combination of several cases."""

    def combine(subject: Subject) -> Iterator[tuple[str, tuple[Any, ...]]]:
        combined: list[tuple[str, tuple[Any, ...]]] = [("", ())]
        for source in sources:
            combined = [
                (f"{name}, {other}" if name else other, (*case, *more))
                for name, case in combined
                for other, more in source(subject)
            ]
        yield from combined

    return combine


def where(holds: Callable[[Subject], bool], cases: Cases) -> Cases:
    """The cases for those methods for which `holds`, none for others."""
    return lambda subject: cases(subject) if holds(subject) else ()
