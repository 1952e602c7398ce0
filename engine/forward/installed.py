"""Whether the libraries are here that a forward pass needs: asked by the plan, which imports none of them."""

from importlib.util import find_spec

from mergemill.engine.errors import PlanError

EXTRA = "mergemill[gates]"


def check_installed(*, forward: bool, where: str) -> None:
    """Raise `PlanError` that names the extra unless tokenizers is here, and for a forward pass transformers."""
    for name in ("tokenizers", *(("transformers",) if forward else ())):
        if find_spec(name) is None:
            raise PlanError(f"{where}: gates from prompts need {name}, which is not installed; install {EXTRA}")
