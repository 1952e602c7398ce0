"""The rounds that tensors cut over several parts go through together, before any of their pieces is merged."""

from collections.abc import Iterator, Sequence

from mergemill.engine.plan.memory import needs_passes
from mergemill.engine.plan.values import Part, Piece, Plan
from mergemill.engine.tensors.merged import Merged


def iter_cut_tensors(plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the tensors of which `parts` hold pieces and whose statistics need all pieces of the plan."""
    wanted = {piece.tensor.name for part in parts for piece in cut_pieces(part)}
    pieces: dict[str, list[Piece]] = {}
    for part in plan.parts:
        for piece in cut_pieces(part):
            if piece.tensor.name in wanted:
                pieces.setdefault(piece.tensor.name, []).append(piece)
    yield from pieces.items()


def count_rounds(piece: Piece) -> int:
    """Return how many rounds all pieces of the piece's tensor go through before it is merged."""
    expression = piece.tensor.expression
    assert isinstance(expression, Merged)
    return expression.rounds() + (piece.tensor.most_growth is not None)


def cut_pieces(part: Part) -> list[Piece]:
    """Return the pieces of a part that need such rounds."""
    return [piece for piece in part.pieces if not piece.whole and needs_passes(piece)]
