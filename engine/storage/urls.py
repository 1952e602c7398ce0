"""Which URLs may be written into plans, records, cards and messages: those that hold no secret.

A secret in a URL would be copied with the recipe beside the output. Decisions (2026-11-29): a bare user stays where
the place cannot be named without it (`sftp://me@host`, `abfs://container@account`), and is refused elsewhere, since
tokens are given so; no query anywhere, signed or not; no URL inside of another (`zip::https://…`).
"""

import re

_USERS = ("sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "abfs", "abfss", "wasb", "wasbs", "adl")  # schemes


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
