"""Pages with pictures: where they go, and that they can be drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mergemill.engine import values


def check_page(html: str) -> None:
    """Raise, before anything is read, where no page can be drawn, or its folder is not there."""
    from mergemill.engine import reports

    reports.check_drawing()
    if not Path(html).absolute().parent.is_dir():
        raise typer.BadParameter(f"{html}: its folder is not there; make it first")
    if Path(html).is_dir():
        raise typer.BadParameter(f"{html}: is a folder; name a file, such as {html.rstrip('/')}/report.html")


def write_page(found: "values.Diff", html: str, **told: Any) -> None:
    """Write the page of a comparison."""
    from mergemill.engine import reports

    Path(html).write_text(reports.make_page(found, **told), "utf-8")
