"""Locations: one text means one place, wherever it is given, or is refused with what would be right."""

from pathlib import Path

import pytest

from mergemill.engine.errors import CheckpointError, OutputError
from mergemill.engine.storage.urls import parse_path, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("S3://bucket/A%20b", "s3://bucket/A%20b"),
        ("HF://org/name@main", "hf://org/name@main"),
        ("file:///a/b%20c", "/a/b c"),
        ("FILE:/a", "/a"),
        ("file://LocalHost/a@b+c%25", "/a@b+c%"),
        ("file:///a/%C3%A9", "/a/é"),
        ("org/name", "org/name"),
        ("./a/", "./a/"),
        ("/a/s3://b?c::d", "/a/s3://b?c::d"),
        ("./s3:/b", "./s3:/b"),
        ("a:b", "a:b"),
        ("/a%20b", "/a%20b"),
        ("~nobody-at-all/x", "~nobody-at-all/x"),
    ],
)
def test_a_location_is_a_path_or_a_url(text: str, place: str) -> None:
    assert parse_place(text) == place
    assert parse_place(place) == place


def test_the_home_folder_is_meant_by_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_place("~/x") == parse_place(Path("~/x")) == "/home/me/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty location; the folder here is written ."),
        (" ", "an empty location"),
        ("s3:/b/x", "s3:/b/x: is no URL; write s3://b/x, or ./s3:/b/x for a folder"),
        ("HF:org/name", "HF:org/name: is no URL; write hf://org/name"),
        ("https:/me:HUSH@host/x", "https://host/x: its URL holds a user or a password"),
        ("file:", "file:: is no file URL; that is file:///folder"),
        ("file://", "file://: is no file URL"),
        ("file:a", "file:a: is no file URL"),
        ("file://localhost", "file://localhost: is no file URL"),
        ("file://me:HUSH@host/a", "file://…/a: names a host"),
        ("file:///a?b=%3F", "file:///a?b=%3F: in a file URL, ? is written %3F"),
        ("file:///a#b", "file:///a#b: in a file URL"),
        ("file:///100%", "file:///100%: in a file URL"),
        ("file:///%ff", "file:///%ff: its escapes are no UTF-8"),
        ("file:///%00", "file:///%00: holds %00"),
        ("a\0b", "ab: holds a NUL character"),
        (
            " s3://b/x",
            " s3://b/x: is no URL, which begins with a scheme such as s3://; a folder of that name is ./ s3:",
        ),
        ("://b/x", "://b/x: is no URL"),
        ("s3://b/\n", "s3://b/\n: is no URL; it has control characters"),
        ("zip::S3://b/x", "zip::…: a URL inside of another is not followed"),
    ],
)
def test_what_is_nearly_a_location_is_refused_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(OutputError) as caught:
        parse_place(text, OutputError)
    assert str(caught.value).startswith(message)
    assert "HUSH" not in str(caught.value)


def test_a_path_that_pathlib_made_of_a_url_is_refused_with_the_url() -> None:
    with pytest.raises(CheckpointError, match="s3:/b/x: is no URL; write s3://b/x"):
        parse_place(Path("s3://b/x"))


def test_what_must_lie_on_a_disk_is_no_url() -> None:
    assert parse_path("file:///a", OutputError, what="a recipe") == Path("/a")
    with pytest.raises(
        OutputError, match=r"s3://b/r\.yml: a recipe lies on a disk of this machine; copy it there first"
    ):
        parse_path("s3://b/r.yml", OutputError, what="a recipe")
