"""What a location says, wherever one is given: a path of this machine, or a URL that holds no secret.

`parse_place` is the only reader of locations: of models, outputs, recipes, cluster files and folders, so that one text
means one place, read or written. Decisions (2026-11-29): schemes are in lower case; file URLs mean paths, with their
escapes undone, and other URLs are taken as they are; what is nearly a URL, and would be a path, is refused.

A secret in a URL would be copied with the recipe beside the output. Decisions (2026-11-29): a bare user stays where
the place cannot be named without it (`sftp://me@host`, `abfs://container@account`), and is refused elsewhere, since
tokens are given so; no query anywhere, signed or not; no URL inside of another (`zip::https://…`).
"""

import functools
import os
import re
from pathlib import Path
from urllib.parse import unquote

from mergemill.engine.errors import CheckpointError, MergemillError

PICKLED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")  # of files that torch.save wrote
WEIGHT_ENDINGS = (".safetensors", *PICKLED_ENDINGS)  # of files that are models by themselves

_USERS = ("sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "abfs", "abfss", "wasb", "wasbs", "adl")  # schemes
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_NEARLY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):/*(?P<rest>.*)", re.DOTALL)
_FILE = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>.*)", re.IGNORECASE | re.DOTALL)
_KNOWN = ("s3", "s3a", "hf", "gs", "gcs", "az", "http", "https", "memory", *_USERS)
_WRONG_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PATHS = ("/", ".", "~")  # as paths begin that show themselves to be some
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@functools.lru_cache(1024)
def is_url(text: str) -> bool:
    """Whether a text begins as URLs do, with a scheme: ``/a/s3://b`` does not."""
    return _SCHEME.match(text) is not None


def parse_place(given: str | Path, error: type[MergemillError] = CheckpointError) -> str:
    """Return the path or the URL that a location means; `error` says what is wrong with it, and what would be right.

    A path is as it was given, ``~`` being the home folder; so is what may be a name on the Hub.

    >>> parse_place("S3://bucket/a%20b"), parse_place("file://localhost/a%20b"), parse_place("a/b")
    ('s3://bucket/a%20b', '/a b', 'a/b')
    >>> parse_place("s3:/b/a")
    Traceback (most recent call last):
    mergemill.engine.errors.CheckpointError: s3:/b/a: is no URL; write s3://b/a, or ./s3:/b/a for a folder
    """
    text = str(given)
    if fault := _find_fault(text):
        raise error(fault)
    if found := _FILE.fullmatch(text):
        return unquote(found["path"], errors="strict")
    if found := _SCHEME.match(text):
        return f"{found['scheme'].lower()}://{text[found.end() :]}"
    return os.path.expanduser(text)  # noqa: PTH111 -- pathlib's raises for a home folder that nobody has


def parse_path(given: str | Path, error: type[MergemillError], *, what: str) -> Path:
    """Return the path of a file or folder of this machine; `error` for a URL of any other place."""
    place = parse_place(given, error)
    if is_url(place):
        raise error(f"{given}: {what} lies on a disk of this machine; copy it there first")
    return Path(place)


def _find_fault(text: str) -> str:
    """Return what is wrong with a location; empty if nothing is."""
    if not text.strip():
        return "an empty location; the folder here is written ."
    if "\0" in text:
        return f"{text.replace(chr(0), '')}: holds a NUL character, which no name does"
    if found := _FILE.fullmatch(text):
        return _find_file_fault(text, found)
    if "://" in text and not text.startswith(_PATHS):
        return find_secret(text) or _find_url_fault(text)
    if (nearly := _NEARLY.fullmatch(text)) and (scheme := nearly["scheme"].lower()) in _KNOWN:
        url = f"{scheme}://{nearly['rest']}"
        return find_secret(url) or f"{text}: is no URL; write {url}, or ./{text} for a folder"
    return ""


def _find_url_fault(text: str) -> str:
    if _SCHEME.match(text) is None:
        return f"{text}: is no URL, which begins with a scheme such as s3://; a folder of that name is ./{text}"
    return f"{text}: is no URL; it has control characters" if _CONTROL.search(text) else ""


def _find_file_fault(text: str, found: "re.Match[str]") -> str:
    host, path = found["host"] or "", found["path"]
    if host.lower() not in ("", "localhost"):
        return f"file://…{path}: names a host; a file URL is file:///folder, and means a folder of this machine"
    if not path.startswith("/"):
        return f"{text}: is no file URL; that is file:///folder, from the root on; or write the path alone"
    if "?" in path or "#" in path or _WRONG_ESCAPE.search(path):
        return f"{text}: in a file URL, ? is written %3F, # %23 and % itself %25; or write the path alone"
    try:
        return f"{text}: holds %00, which no name does" if "\0" in unquote(path, errors="strict") else ""
    except UnicodeDecodeError:
        return f"{text}: its escapes are no UTF-8; write the path alone"


def find_secret(url: str) -> str:
    """Return, without repeating it, what a URL holds that may not be written down; empty where it holds nothing.

    >>> find_secret("sftp://me@host/a"), find_secret("hf://org/name@main"), find_secret("/a/b?c::d")
    ('', '', '')
    >>> find_secret("s3://bucket/a?sig=hush")
    's3://bucket/a: its URL holds a query, which would be written beside the output; leave it out'
    """
    scheme, found, rest = url.partition("://")
    scheme = scheme.lower()
    if not found or scheme == "file":
        return ""
    if "::" in url:
        return f"{scheme.partition('::')[0]}::…: a URL inside of another is not followed; copy the file first"
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@")
    place = f"{scheme}://{host.partition('?')[0]}{slash}{path.partition('?')[0]}"
    where = "which would be written beside the output; leave it out, and set it in the environment"
    if at and (":" in user or (scheme.rpartition("+")[2] not in _USERS and (scheme != "hf" or slash))):
        return f"{place}: its URL holds a user or a password, {where}"
    if "?" in rest:
        return f"{place}: its URL holds a query, which would be written beside the output; leave it out"
    return ""


def hide_secrets(text: str) -> str:
    """Return an error of a library without what URLs in it hold of users, passwords and signatures.

    >>> hide_secrets('cannot connect to "http://me:hush@host/a?sig=x" now')
    'cannot connect to "http://host/a'
    """
    return re.sub(r"//[^/\s]*@", "//", text).split("?", 1)[0]
