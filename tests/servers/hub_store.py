"""What the Hub knows: repositories, each a history of commits, and contents by their SHA-256 in one folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LARGE_SUFFIXES = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".npz", ".parquet"}
"""Of the `.gitattributes` that the Hub gives a new repository: files that go to the large file storage."""
LARGE_BYTES = 10 << 20
"""Files of any name go there from this size on."""
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LARGE_SUFFIXES))
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One version of a file."""

    size_bytes: int
    sha256: str
    large: bool
    """Whether it lies in the large file storage, and Git has a pointer to it."""
    git_oid: str
    """What Git calls the file, or the pointer to it."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository."""

    sha: str
    parent: str
    title: str
    files: Mapping[str, File]

    def find_folders(self) -> set[str]:
        """Return the paths of all folders, without the root."""
        parents = {str(parent) for path in self.files for parent in PurePosixPath(path).parents}
        return parents - {"."}


@dataclass(slots=True)
class Repo:
    """One repository."""

    name: str
    private: bool
    gated: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """The commit that each of them is at."""

    def find_commit(self, revision: str) -> Commit | None:
        """Return the commit of a branch or of its own SHA."""
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, changes: Mapping[str, File | None], title: str, branch: str = "main") -> Commit:
        """Move a branch to a new commit; a file of None is deleted."""
        parent = self.find_commit(branch)
        files = {**(parent.files if parent else {}), **changes}
        kept = {path: file for path, file in sorted(files.items()) if file}
        said = [self.name, parent and parent.sha, title, [(path, file.sha256) for path, file in kept.items()]]
        sha = hashlib.sha1(json.dumps(said).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent.sha if parent else "", title, kept)
        self.branches[branch] = sha
        return self.commits[sha]


class Contents:
    """All contents, each a file that is named by its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, sha256: str) -> Path | None:
        """Return where a content lies."""
        path = self.folder / sha256
        return path if path.exists() else None

    def keep(self, content: bytes | Path, path: str) -> File:
        """Add a content, for a file of this path in a repository. One that is a file stays where it is."""
        if isinstance(content, bytes):
            sha256 = hashlib.sha256(content).hexdigest()
            if not self.find(sha256):
                (self.folder / sha256).write_bytes(content)
            return self.describe(sha256, path)
        with content.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.find(sha256):
            (self.folder / sha256).symlink_to(content.absolute())
        return self.describe(sha256, path)

    def describe(self, sha256: str, path: str, *, large: bool | None = None) -> File:
        """Return a file of this path and a content that is there; `large` is for who knows better."""
        content = self.folder / sha256
        size_bytes = content.stat().st_size
        large = is_large(path, size_bytes) if large is None else large
        in_git = make_pointer(sha256, size_bytes) if large else content.read_bytes()
        return File(size_bytes, sha256, large, hash_for_git(in_git))


def is_large(path: str, size_bytes: int) -> bool:
    """Whether a file goes to the large file storage."""
    return size_bytes > 0 and (size_bytes >= LARGE_BYTES or PurePosixPath(path).suffix in LARGE_SUFFIXES)


def make_pointer(sha256: str, size_bytes: int) -> bytes:
    """Return what Git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def hash_for_git(content: bytes) -> str:
    """Return the name of a content in Git."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
