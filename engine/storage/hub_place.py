"""URLs of the Hub: ``hf://org/name[@revision][/folder]``."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mergemill.engine.errors import CheckpointError

_OTHERS = ("datasets", "spaces", "kernels", "buckets")
_URL = re.compile(
    r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/@]+))?"
    r"(?:/(?P<path>.*))?"
)


@dataclass(frozen=True, slots=True)
class HubPlace:
    """What a URL of the Hub names."""

    repo: str  # org/name
    revision: str | None  # a branch, tag or commit; None is the main branch
    path: str = ""  # of a file or folder in it; empty for the root

    def __str__(self) -> str:
        """Return the URL."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}/{self.path}".rstrip("/")

    @property
    def download(self) -> str:
        """The command that brings it into the Hub's cache."""
        return f"hf download {self.repo}" + (f" --revision {self.revision}" if self.revision else "")


def parse_url(url: str) -> HubPlace:
    """Return what a URL names; `CheckpointError` says how one is written.

    >>> parse_url("hf://org/name@refs/pr/1/sub")
    HubPlace(repo='org/name', revision='refs/pr/1', path='sub')
    """
    kind = url.removeprefix("hf://").partition("/")[0]
    if kind in _OTHERS:
        raise CheckpointError(f"{url}: {kind} of the Hub cannot be merged; a model is written hf://org/name")
    found = _URL.fullmatch(url)
    if found is None or not _is_name(found["repo"]):
        raise CheckpointError(f"{url}: a model on the Hub is written hf://org/name[@revision][/folder]")
    revision = found["revision"]
    return HubPlace(found["repo"], unquote(revision) if revision else None, (found["path"] or "").strip("/"))


def _is_name(repo: str) -> bool:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True
