"""The Hub's answers to who reads: what a repository has, and where the bytes are.

Source: huggingface_hub 2.4.0, `hf_api.py` and `file_download.py`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from servers.hub_calls import Call, Refusal, make_json
from servers.hub_store import Commit, File, hash_for_git, make_pointer
from servers.web import Answer

DATE = "2026-01-01T00:00:00.000Z"


def answer_whoami(call: Call) -> Answer:
    """Say whose token it is."""
    if not call.token:
        raise Refusal(401, "", "Invalid username or password.")
    name = "owner" if call.owner else "stranger"
    return make_json({"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token"}})


def answer_search(call: Call) -> Answer:
    """List the repositories that are called so, in one page."""
    words = call.parameters.get("search", "")
    found = [repo for repo in call.hub.repos.values() if words in repo.name and not repo.private]
    return make_json([{"id": repo.name, "modelId": repo.name, "tags": [], "private": False} for repo in found])


def answer_info(call: Call) -> Answer:
    """Describe a repository at a revision, by default that of `main`."""
    repo = call.find_repo()
    commit = repo.find_commit(call.route["revision"] or "main")
    if commit is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {call.route['revision']}")
    blobs = "blobs" in call.parameters
    files = [{"rfilename": path} | (describe_blob(file) if blobs else {}) for path, file in commit.files.items()]
    known = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": commit.sha}
    state = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
    return make_json({**known, **state, "lastModified": DATE, "createdAt": DATE, "tags": [], "siblings": files})


def answer_tree(call: Call) -> Answer:
    """List a folder, or all that is below it, in pages."""
    repo = call.find_repo()
    commit, folder = call.find_commit(repo), call.route["path"]
    entries = list_folder(commit, folder, recursive=call.parameters.get("recursive") == "true")
    if not entries and folder:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {commit.sha}")
    start = int(call.parameters.get("cursor", 0))
    stop = start + call.hub.page_entries
    fields = {}
    if stop < len(entries):
        path = f"/api/models/{repo.name}/tree/{quote(call.route['revision'], safe='')}/{quote(folder)}".rstrip("/")
        fields["Link"] = f'<{call.url}{path}?{urlencode({**call.parameters, "cursor": stop})}>; rel="next"'
    return make_json(entries[start:stop], fields=fields)


def answer_paths(call: Call) -> Answer:
    """Describe those of some paths that are there."""
    commit = call.find_commit(call.find_repo())
    asked = parse_qs(b"".join(call.pieces).decode()).get("paths", [])
    return make_json([entry for path in asked for entry in describe_path(commit, path)])


def answer_refs(call: Call) -> Answer:
    """List the branches."""
    repo = call.find_repo()
    named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()]
    return make_json({"branches": named, "tags": [], "converts": [], "pullRequests": []})


def answer_commits(call: Call) -> Answer:
    """List the commits of a revision, the last one first."""
    repo = call.find_repo()
    commit: Commit | None = call.find_commit(repo)
    listed = []
    while commit:
        listed.append({"id": commit.sha, "title": commit.title, "message": "", "date": DATE, "authors": []})
        commit = repo.commits.get(commit.parent)
    return make_json(listed)


def answer_resolve(call: Call) -> Answer:
    """Redirect to the signed address of a large file, or to where small files of this commit are."""
    repo = call.find_repo(content=True)
    commit = call.find_commit(repo)
    file = call.find_file(commit)
    if not file.large and not call.hub.redirects_small:
        return answer_small(call)
    if not file.large:
        path = quote(f"{repo.name}/{commit.sha}/{call.route['path']}")
        query = urlencode({f"/{repo.name}/resolve/{call.route['revision']}/{call.route['path']}": ""})
        return redirect(307, f"/api/resolve-cache/models/{path}?{query}", {"X-Repo-Commit": commit.sha})
    linked = {"X-Linked-Size": str(file.size_bytes), "X-Linked-ETag": f'"{file.sha256}"'}
    location = call.hub.sign(f"/cdn/{file.sha256}", call.hub.cdn_url)
    return redirect(302, location, {"X-Repo-Commit": commit.sha, **linked})


def answer_small(call: Call) -> Answer:
    """Send a small file."""
    commit = call.find_commit(call.find_repo(content=True))
    file = call.find_file(commit)
    fields = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.git_oid}"', "Content-Type": "text/plain; charset=utf-8"}
    return Answer(200, find_content(call, file.sha256), fields)


def answer_cdn(call: Call) -> Answer:
    """Send a large file to who has a signed address of it."""
    sha256 = call.route["sha256"]
    call.check_signature(f"/cdn/{sha256}")
    etag = hashlib.sha256(sha256.encode()).hexdigest()  # looks like that of the Hub, and is another one
    return Answer(200, find_content(call, sha256), {"ETag": f'"{etag}"', "Content-Type": "binary/octet-stream"})


def redirect(status: int, location: str, fields: Mapping[str, str]) -> Answer:
    """Return a redirect. Its ETag is of its own text, which changes with every signature."""
    text = f"Redirecting to {location}".encode()
    return Answer(status, text, {**fields, "ETag": f'W/"{hashlib.md5(text).hexdigest()}"', "Location": location})


def find_content(call: Call, sha256: str) -> Path:
    """Return where a content lies that some commit has."""
    content = call.hub.contents.find(sha256)
    assert content
    return content


def list_folder(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return what is in a folder, in the order of the paths."""
    start = f"{folder}/" if folder else ""
    below = sorted(path for path in {*commit.files, *commit.find_folders()} if path.startswith(start))
    kept: Iterable[str] = below if recursive else (path for path in below if "/" not in path[len(start) :])
    return [entry for path in kept for entry in describe_path(commit, path)]


def describe_path(commit: Commit, path: str) -> list[dict[str, Any]]:
    """Return the entry of a file or a folder, nothing for any other path."""
    if file := commit.files.get(path):
        large = {"lfs": {"oid": file.sha256, "size": file.size_bytes, "pointerSize": count_pointer(file)}}
        plain = {"type": "file", "oid": file.git_oid, "size": file.size_bytes, "path": path}
        return [plain | large if file.large else plain]
    if path in commit.find_folders():
        return [{"type": "directory", "oid": hash_for_git(f"{commit.sha}{path}".encode()), "size": 0, "path": path}]
    return []


def describe_blob(file: File) -> dict[str, Any]:
    """Return what the description of a repository says of a file, if asked for it."""
    large = {"lfs": {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": count_pointer(file)}}
    return {"size": file.size_bytes, "blobId": file.git_oid} | (large if file.large else {})


def count_pointer(file: File) -> int:
    """Return the bytes of the pointer to a large file."""
    return len(make_pointer(file.sha256, file.size_bytes))
