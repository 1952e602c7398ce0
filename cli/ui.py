"""``mergemill ui``: a page to merge from."""

from pathlib import Path
from typing import Annotated

import typer

from mergemill.cli.options import Cluster, Methods, Scheduler

Root = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="What the page works below: models and merges.")]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Where it listens; 0: any that is free.")]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Another than this machine's own, with a token of yours.")]
Url = Annotated[str, typer.Option(metavar="URL", help="By which browsers reach it, where a proxy is between.")]
FramedBy = Annotated[str, typer.Option(metavar="URL", help="A site that may show it in a frame, as the Hub does.")]


def ui(
    folder: Root = Path(),
    port: Port = 8797,
    host: Host = "127.0.0.1",
    url: Url = "",
    framed_by: FramedBy = "",
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    methods: Methods = None,
) -> None:
    """Merge from a page in the browser.

    Example: mergemill ui models
    """
    from mergemill.engine import errors, load_cluster

    try:
        from mergemill.cli.page.gate import Address, check_site
        from mergemill.cli.page.serve import serve
        from mergemill.cli.page.settings import Setup
    except ImportError as error:
        raise errors.InputError(f"{error.name or error} is not installed; pip install mergemill[ui]") from error
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder}: is no folder; make it first")
    if scheduler and cluster:
        raise typer.BadParameter("--scheduler and --cluster exclude each other")
    check_site("--url", url)
    check_site("--framed-by", framed_by)
    if cluster:
        load_cluster(cluster)
        cluster = str(Path(cluster).absolute()) if Path(cluster).suffix in (".yml", ".yaml") else cluster
    own = tuple(str(Path(path).absolute()) for path in methods or ())
    serve(Setup(folder.absolute(), own, scheduler or "", cluster or ""), Address(host, port, url, framed_by))
