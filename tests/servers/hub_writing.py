"""The Hub's answers to who writes: new repositories, uploads to the large file storage, commits.

Source: huggingface_hub 2.4.0, `_commit_api.py` and `lfs.py`; git-lfs, docs/api/batch.md.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servers.hub_calls import Call, Refusal, make_denial, make_json
from servers.hub_store import File, Repo, is_large
from servers.web import Answer


def answer_create_repo(call: Call) -> Answer:
    """Make a repository, with the first commit that the Hub gives it."""
    if not call.owner:
        raise Refusal(403 if call.token else 401, "", "Invalid username or password.")
    asked = call.read_json()
    name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
    if name in call.hub.repos:
        raise Refusal(409, "", "You already created this model repo")
    call.hub.add_repo(name, private=asked.get("visibility") == "private" or asked.get("private", False))
    return make_json({"url": f"{call.url}/{name}", "name": name, "id": name})


def answer_validate(call: Call) -> Answer:
    """Find no fault with a model card."""
    return make_json({"errors": [], "warnings": []})


def answer_branch(call: Call) -> Answer:
    """Make a branch."""
    repo = call.find_repo(writes=True)
    start = repo.find_commit(call.read_json().get("startingPoint", "main"))
    if start is None:
        raise Refusal(404, "RevisionNotFound", "Invalid rev id")
    if call.route["branch"] in repo.branches:
        raise Refusal(409, "", "Reference already exists")
    repo.branches[call.route["branch"]] = start.sha
    return make_json({})


def answer_preupload(call: Call) -> Answer:
    """Say which files go to the large file storage, and which are there as they are."""
    repo = call.find_repo(writes=True)
    commit = call.find_commit(repo)
    return make_json({"files": [choose_mode(file, commit.files) for file in call.read_json()["files"]]})


def choose_mode(asked: Mapping[str, Any], files: Mapping[str, File]) -> dict[str, Any]:
    """Return where one file goes."""
    known = files.get(asked["path"])
    oid = None if known is None else known.sha256 if known.large else known.git_oid
    mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def answer_batch(call: Call) -> Answer:
    """Say where contents go that are not there yet: in one piece, or in parts where they are larger than these."""
    repo = call.find_repo(writes=True)
    asked = call.read_json()["objects"]
    return make_json({"transfer": "basic", "objects": [plan_upload(call, repo, each) for each in asked]})


def plan_upload(call: Call, repo: Repo, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the addresses for one content."""
    hub, sha256, size_bytes = call.hub, asked["oid"], asked["size"]
    planned = {"oid": sha256, "size": size_bytes}
    if hub.contents.find(sha256):
        return planned
    count = math.ceil(size_bytes / hub.part_bytes)
    parts = {str(part): hub.sign(f"/cdn/upload/{sha256}/{part}", hub.cdn_url) for part in range(1, count + 1)}
    if count == 1:
        upload: dict[str, Any] = {"href": parts["1"]}
    else:
        complete = hub.sign(f"/api/complete/{sha256}", call.url)
        upload = {"href": complete, "header": {"chunk_size": str(hub.part_bytes), **parts}}
    verify = {"href": f"{call.url}/{repo.name}.git/info/lfs/verify"}
    return {**planned, "actions": {"upload": upload, "verify": verify}}


def answer_cdn_put(call: Call) -> Answer:
    """Take a content, or a part of one, from who has a signed address for it."""
    sha256, part = call.route["sha256"], call.route["part"]
    call.check_signature(f"/cdn/upload/{sha256}/{part}")
    digest, target = hashlib.md5(), find_part(call, part)
    incoming = target.with_suffix(f".{call.hub.count_up()}")
    with incoming.open("wb") as file:
        for piece in call.pieces:
            digest.update(piece)
            file.write(piece)
    incoming.rename(target)
    return Answer(200, b"", {"ETag": f'"{digest.hexdigest()}"'})


def answer_complete_parts(call: Call) -> Answer:
    """Join the parts of a content."""
    sha256 = call.route["sha256"]
    call.check_signature(f"/api/complete/{sha256}")
    asked = call.read_json()["parts"]
    with find_part(call, "1").open("ab") as whole:
        for number in range(2, len(asked) + 1):
            part = find_part(call, str(number))
            if not part.exists():
                raise make_denial(400, "InvalidPart", f"part {number} is not there")
            whole.write(part.read_bytes())
            part.unlink()
    return make_json({})


def answer_verify(call: Call) -> Answer:
    """Take an upload for what it should be, if it is."""
    call.find_repo(writes=True)
    asked = call.read_json()
    uploaded = call.hub.contents.folder / f"{asked['oid']}-1"
    if call.hub.contents.find(asked["oid"]):
        return make_json({})
    if not uploaded.exists() or uploaded.stat().st_size != asked["size"]:
        raise Refusal(404, "", "Not all of the object has been uploaded")
    with uploaded.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != asked["oid"]:
            raise Refusal(400, "", "The object has another SHA-256")
    uploaded.rename(call.hub.contents.folder / asked["oid"])
    return make_json({})


def answer_commit(call: Call) -> Answer:
    """Move a branch, if it is where the client thinks."""
    repo = call.find_repo(writes=True)
    lines = [json.loads(line) for line in b"".join(call.pieces).splitlines()]
    [header] = [line["value"] for line in lines if line["key"] == "header"]
    commit = call.find_commit(repo)
    if header.get("parentCommit", commit.sha) != commit.sha:
        raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
    changes: dict[str, File | None] = {}
    for line in lines:
        changes |= read_change(call, line["key"], line["value"], commit.files)
    new = call.hub.commit(repo, changes, header["summary"], call.route["revision"])
    return make_json({"success": True, "commitOid": new.sha, "commitUrl": f"{call.url}/{repo.name}/commit/{new.sha}"})


def read_change(call: Call, key: str, value: Mapping[str, Any], files: Mapping[str, File]) -> dict[str, File | None]:
    """Return what one line of a commit does to the files."""
    path = value.get("path", "")
    if key == "file":
        return {path: call.hub.contents.keep(base64.b64decode(value["content"]), path)}
    if key == "lfsFile" and not call.hub.contents.find(value["oid"]):
        raise Refusal(400, "", f"{path} points to {value['oid']}, which has not been uploaded")
    if key == "lfsFile":
        return {path: call.hub.contents.describe(value["oid"], path, large=True)}
    if key == "deletedFile" and path not in files:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    if key == "deletedFile":
        return {path: None}
    if key == "deletedFolder":
        return {each: None for each in files if each.startswith(f"{path.rstrip('/')}/")}
    return {}


def find_part(call: Call, part: str) -> Path:
    """Return where a part of an upload lies."""
    return call.hub.contents.folder / f"{call.route['sha256']}-{part}"
