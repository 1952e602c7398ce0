"""The addresses of the Hub that its client uses, each with the name that tests count it by.

Source: huggingface_hub 2.4.0. Names of repositories have two parts; revisions and paths come percent-encoded.
"""

import re
from collections.abc import Mapping
from urllib.parse import unquote

REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
SHA256 = r"(?P<sha256>[0-9a-f]{64})"

ROUTES = tuple(
    (name, methods.split(), re.compile(pattern))
    for name, methods, pattern in (
        ("whoami", "GET", "/api/whoami-v2"),
        ("search", "GET", "/api/models"),
        ("create_repo", "POST", "/api/repos/create"),
        ("validate", "POST", "/api/validate-yaml"),
        ("info", "GET", f"/api/models/{REPO}(?:/revision/{REVISION})?"),
        ("tree", "GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?"),
        ("paths", "POST", f"/api/models/{REPO}/paths-info/{REVISION}"),
        ("refs", "GET", f"/api/models/{REPO}/refs"),
        ("commits", "GET", f"/api/models/{REPO}/commits/{REVISION}"),
        ("branch", "POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)"),
        ("preupload", "POST", f"/api/models/{REPO}/preupload/{REVISION}"),
        ("commit", "POST", f"/api/models/{REPO}/commit/{REVISION}"),
        ("resolve", "GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)"),
        ("small", "GET HEAD", f"/api/resolve-cache/models/{REPO}/{REVISION}/(?P<path>.+)"),
        ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
        ("verify", "POST", rf"/{REPO}\.git/info/lfs/verify"),
        ("complete_parts", "POST", f"/api/complete/{SHA256}"),
        ("cdn", "GET HEAD", f"/cdn/{SHA256}"),
        ("cdn_put", "PUT", rf"/cdn/upload/{SHA256}/(?P<part>\d+)"),
    )
)


def find_route(method: str, path: str) -> tuple[str, Mapping[str, str]] | None:
    """Return the name of what is asked and the parts of the path, decoded; None for anything else."""
    for name, methods, pattern in ROUTES:
        if method in methods and (match := pattern.fullmatch(path)):
            return name, {key: unquote(value) for key, value in match.groupdict(default="").items()}
    return None
