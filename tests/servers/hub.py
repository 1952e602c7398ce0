"""A Hub of its own for the tests: `huggingface_hub` talks to it unmodified, through `HF_ENDPOINT`.

It has models with commits and branches, large files behind redirects to signed addresses that run out, private and
gated repositories, and takes uploads. Its storage is another origin, as that of the Hub is: the client follows
redirects that stay on the Hub's own. What it does not have: Xet (set `HF_HUB_DISABLE_XET`), datasets, spaces, tags,
pull requests, organisations, limits of rate, and compressed answers.
"""

import contextlib
import hashlib
import hmac
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from servers import hub_reading, hub_writing
from servers.hub_calls import Call, Refusal, make_json
from servers.hub_routes import find_route
from servers.hub_store import GIT_ATTRIBUTES, Commit, Contents, File, Repo
from servers.journal import Exchange, Journal
from servers.web import Answer, Web, WebHandler, serve

LIFETIME_S = 3600
PAGE_ENTRIES = 1000
PART_BYTES = 5 << 30

ANSWERS: dict[str, Callable[[Call], Answer]] = {
    name.removeprefix("answer_"): answer
    for room in (hub_reading, hub_writing)
    for name, answer in vars(room).items()
    if name.startswith("answer_")
}
"""By the names of `hub_routes`."""


class Hub:
    """The Hub, which runs."""

    def __init__(self, folder: Path) -> None:
        self.token = f"hf_{secrets.token_hex(17)}"
        """Of the user who owns every repository."""
        self.stranger = f"hf_{secrets.token_hex(17)}"
        """Of a user who has been let into none."""
        self.lifetime_s: float = LIFETIME_S
        """For how long a signed address holds, from now on."""
        self.page_entries = PAGE_ENTRIES
        """How many entries of a tree come at once."""
        self.part_bytes = PART_BYTES
        """Uploads larger than this come in parts of this size."""
        self.redirects_small = True
        """Whether small files are one redirect away as well, on the Hub itself; a token is needed there too."""
        self.repos: dict[str, Repo] = {}
        self.contents = Contents(folder)
        self.journal = Journal()
        """What was asked, of the Hub and of its storage; `kind` is as in `hub_routes`."""
        self._key = secrets.token_bytes(32)
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._web, self._storage = HubWeb(self), HubWeb(self)
        self.url = self._web.url
        """The Hub, without a slash at the end: `HF_ENDPOINT`."""
        self.cdn_url = self._storage.url
        """Where large files are: put the address of a proxy here to have redirects go through it."""

    def add_repo(
        self, name: str, files: Mapping[str, bytes | Path] | None = None, *, private: bool = False, gated: bool = False
    ) -> str:
        """Add a repository of these files; return the SHA of its commit. A file may lie anywhere, and stays there."""
        self.repos[name] = Repo(name, private, gated)
        return self.add_commit(name, {".gitattributes": GIT_ATTRIBUTES.encode(), **(files or {})}, "initial commit")

    def add_commit(
        self, name: str, files: Mapping[str, bytes | Path | None], title: str = "more", branch: str = "main"
    ) -> str:
        """Move a branch of a repository, which may be new, to a commit with these files; return its SHA.

        Files of None are deleted, those that are not named stay.
        """
        changes = {
            path: content if content is None else self.contents.keep(content, path) for path, content in files.items()
        }
        return self.commit(self.repos[name], changes, title, branch).sha

    def move_branch(self, name: str, branch: str, sha: str) -> None:
        """Have a branch, which may be new, be at another commit."""
        assert sha in self.repos[name].commits
        self.repos[name].branches[branch] = sha

    def expire_locations(self) -> None:
        """Have all addresses that are signed so far run out."""
        self._key = secrets.token_bytes(32)

    def make_environ(self, home: Path, *, token: str = "") -> dict[str, str]:
        """Return the variables by which a process that starts with them uses this Hub and nothing of its user's."""
        named = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return named | ({"HF_TOKEN": token} if token else {})

    def commit(self, repo: Repo, changes: Mapping[str, File | None], title: str, branch: str) -> Commit:
        """Move a branch to a new commit; a file of None is deleted."""
        with self._lock:
            return repo.commit(changes, title, branch)

    def count_up(self) -> int:
        """Return a number that nobody else got."""
        return next(self._count)

    def sign(self, path: str, url: str) -> str:
        """Return the address of a path at `url`, for who may use it without a token."""
        expires = str(time.time() + self.lifetime_s)
        return f"{url}{path}?{urlencode({'Expires': expires, 'Signature': self._make_signature(path, expires)})}"

    def is_signed(self, path: str, parameters: Mapping[str, str]) -> bool:
        """Whether an address holds."""
        expires, signature = parameters.get("Expires", "0"), parameters.get("Signature", "")
        return hmac.compare_digest(signature, self._make_signature(path, expires)) and float(expires) > time.time()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Answer until the caller is done."""
        with serve(self._web), serve(self._storage):
            yield

    def _make_signature(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


class HubWeb(Web):
    """One of the two addresses of a Hub: its own, and that of its storage."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.hub = hub


class HubHandler(WebHandler):
    """One connection."""

    server: HubWeb
    _exchange: Exchange

    def do_GET(self) -> None:
        """Answer."""
        self._exchange = self.server.hub.journal.open(
            self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
        )
        pieces = self._count_pieces()
        try:
            answer = self._find_answer(pieces)
        except Refusal as refusal:
            answer = refusal.answer
        for _ in pieces:
            pass  # what the answer did not need stands before the next request
        self.send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def note_answer(self, status: int, sent_bytes: int) -> None:
        """Count what goes out."""
        self._exchange.status = status
        self._exchange.note_sent(sent_bytes)

    def _find_answer(self, pieces: Iterator[bytes]) -> Answer:
        target = urlsplit(self.path)
        route = find_route(self.command, target.path)
        if route is None:
            return make_json({"error": "Sorry, we can't find the page you are looking for."}, 404)
        name, parts = route
        hub, url = self.server.hub, f"http://{self.headers['Host']}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (hub.token, hub.stranger):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        parameters = dict(parse_qsl(target.query))
        return ANSWERS[name](Call(hub, parts, parameters, token, pieces, url))

    def _count_pieces(self) -> Iterator[bytes]:
        for piece in self.read_pieces():
            self._exchange.note_received(len(piece))
            yield piece


@contextlib.contextmanager
def start_hub(folder: Path) -> Iterator[Hub]:
    """Start a Hub without repositories that keeps contents in `folder`, which exists."""
    hub = Hub(folder)
    with hub.run():
        yield hub
