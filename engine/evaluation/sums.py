"""What losses of positions say together: perplexity, bits per byte, entropy, and how sure that is."""

import math
from dataclasses import dataclass

from mergemill.engine.evaluation.texts import ScoredTokens
from mergemill.engine.plan.show import Facts, show_html, show_text
from mergemill.engine.plan.sizes import format_size, say_count
from mergemill.engine.tensors.lazy import Tensor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of a text."""

    perplexity: float
    """exp of the mean loss of a token."""
    nll: float
    """The mean loss of a token, in nats; of examples first over the tokens of each."""
    bits_per_byte: float
    """The loss in bits, per byte of the text: alike for models of different vocabularies."""
    tokens: int
    """That were scored."""
    bytes: int
    """Of the text."""
    stderr: float | None
    """The standard error of the perplexity over windows; of examples that of `nll`. Of one window nothing is known."""
    entropy: float
    """Of the predictions, in nats, the mean over the same positions."""
    entropy_stderr: float | None = None
    """Its standard error, over windows or examples."""
    raced: bool = False
    """Whether half of the windows alone were looked at: the loss of the others is an estimate."""
    bytes_read: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    """Of each window or example: the mean loss of its tokens."""

    def __repr__(self) -> str:
        return show_text(*self._show())

    def _repr_html_(self) -> str:
        return show_html(*self._show())

    def _show(self) -> tuple[str, Facts]:
        half = ", by half of the text" if self.raced else ""
        return f"Evaluation: perplexity {self.perplexity:.6g}{half}", (
            ("loss", f"{self.nll:.6g} nats a token"),
            ("stderr", "unknown" if self.stderr is None else f"{self.stderr:.2g}"),
            ("bits per byte", f"{self.bits_per_byte:.6g}"),
            ("entropy", f"{self.entropy:.6g} nats a token"),
            ("scored", f"{say_count(self.tokens, 'token')} of {format_size(self.bytes)}"),
            ("read", f"{format_size(self.bytes_read)} in {self.seconds:.1f} s"),
        )


@dataclass(frozen=True, slots=True)
class RowSums:
    """What a model makes of each row of tokens: sums over the positions that are scored, [rows], float64, in nats."""

    loss: Tensor
    entropy: Tensor


def sum_rows(tokens: ScoredTokens, loss: Tensor, entropy: Tensor) -> RowSums:
    """Return the sums of loss and entropy of the token that comes after each position, [rows, length]."""
    scored = tokens.scored[:, 1:]
    return RowSums((loss[:, :-1] * scored).sum(1), (entropy[:, :-1] * scored).sum(1))


def sum_windows(tokens: ScoredTokens, found: RowSums) -> Evaluation:
    """Return what the scored positions of windows say, each as much as another."""
    sums, entropies, counts = found.loss, found.entropy, tokens.scored.sum(1)
    total, count = float(sums.sum()), int(counts.sum())
    nll = total / count
    error = find_error(sums - nll * counts, count)
    mean = float(entropies.sum()) / count
    return Evaluation(
        perplexity=_exp(nll),
        nll=nll,
        bits_per_byte=total / (math.log(2) * tokens.text_bytes),
        tokens=count,
        bytes=tokens.text_bytes,
        stderr=None if error is None else error * _exp(nll),
        entropy=mean,
        entropy_stderr=find_error(entropies - mean * counts, count),
        losses=tuple((sums / counts.clamp(min=1)).tolist()),
    )


def average_examples(tokens: ScoredTokens, found: RowSums) -> Evaluation:
    """Return what examples say, each as much as another."""
    counts = tokens.scored.sum(1)
    sums, entropies = found.loss, found.entropy / counts
    means = sums / counts
    nll, entropy_mean = float(means.mean()), float(entropies.mean())
    return Evaluation(
        perplexity=_exp(nll),
        nll=nll,
        bits_per_byte=float(sums.sum()) / (math.log(2) * tokens.text_bytes),
        tokens=int(counts.sum()),
        bytes=tokens.text_bytes,
        stderr=find_error(means - nll, len(means)),
        entropy=entropy_mean,
        entropy_stderr=find_error(entropies - entropy_mean, len(means)),
        losses=tuple(means.tolist()),
    )


def find_error(residuals: Tensor, count: int) -> float | None:
    """Return the standard error of a sum over rows divided by `count`, of what each row has beyond its share."""
    rows = len(residuals)
    return math.sqrt(float((residuals**2).sum()) * rows / (rows - 1)) / count if rows > 1 else None


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
