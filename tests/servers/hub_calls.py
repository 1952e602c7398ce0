"""One request to the Hub as its answers see it, and who may do what."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from servers.hub_store import Commit, File, Repo
from servers.web import Answer

if TYPE_CHECKING:
    from servers.hub import Hub


class Refusal(Exception):
    """The Hub says no; the client finds out why from a header."""

    def __init__(self, status: int, code: str, message: str, **fields: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.answer = make_json({"error": message}, status, {**named, "X-Error-Message": message, **fields})


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    hub: "Hub"
    route: Mapping[str, str]
    """The parts of the path, by the names of `hub_routes`."""
    parameters: Mapping[str, str]
    token: str
    """Of the header Authorization; empty where there is none."""
    pieces: Iterator[bytes]
    """The body."""
    url: str
    """The Hub as the client addresses it."""

    def read_json(self) -> Any:
        """Return the value that the body is."""
        return json.loads(b"".join(self.pieces))

    @property
    def owner(self) -> bool:
        """Whether this comes from the one user who may do everything."""
        return self.token == self.hub.token

    def find_repo(self, *, content: bool = False, writes: bool = False) -> Repo:
        """Return the repository, if the caller may know of it, see its content, or write to it."""
        repo = self.hub.repos.get(self.route["repo"])
        if repo is None or (repo.private and not self.owner):
            # Who is not known does not learn what there is.
            message = "Repository not found" if self.token else "Invalid username or password."
            raise Refusal(404 if self.token else 401, "RepoNotFound", message)
        if content and repo.gated and not self.owner:
            raise Refusal(403 if self.token else 401, "GatedRepo", f"Access to model {repo.name} is restricted.")
        if writes and not self.owner:
            raise Refusal(403 if self.token else 401, "", "You don't have the rights to write to this repository.")
        return repo

    def find_commit(self, repo: Repo) -> Commit:
        """Return the commit that the path names."""
        revision = self.route["revision"]
        if commit := repo.find_commit(revision):
            return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def find_file(self, commit: Commit) -> File:
        """Return the file that the path names."""
        if file := commit.files.get(self.route["path"]):
            return file
        raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})

    def check_signature(self, path: str) -> None:
        """Refuse an address that is not signed, or not any more, as the servers behind the Hub do."""
        if self.token:
            raise make_denial(400, "InvalidArgument", "Only one auth mechanism allowed")
        if not self.hub.is_signed(path, self.parameters):
            raise make_denial(403, "AccessDenied", "Request has expired")


def make_json(value: Any, status: int = 200, fields: Mapping[str, str] | None = None) -> Answer:
    """Return an answer of a value."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(value).encode(), kind | dict(fields or {}))


def make_denial(status: int, code: str, message: str) -> Refusal:
    """Return what a storage server says, which knows nothing of the Hub's headers."""
    refusal = Refusal(status, "", message)
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    refusal.answer = Answer(status, body.encode(), {"Content-Type": "application/xml"})
    return refusal
