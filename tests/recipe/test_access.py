"""Storage options of a recipe: where storage is, never a secret."""

import pytest
from recipe.test_faults import MODELS, say_fault

from mergemill.engine.recipe import parse_recipe, recipe_to_json

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def test_options_are_plain_values_by_scheme() -> None:
    recipe = parse_recipe(LINEAR + "storage_options: {s3: {profile: team, anonymous: true}}\n", name="r.yml")
    assert recipe.storage == {"s3": {"profile": "team", "anonymous": True}}
    assert recipe_to_json(recipe)["storage_options"] == recipe.storage
    assert parse_recipe(LINEAR, name="r.yml").storage == {}


@pytest.mark.parametrize("name", ["key", "secret", "aws_secret_access_key", "token", "account_key", "password"])
def test_a_secret_is_refused_without_being_said(name: str) -> None:
    fault = say_fault(MODELS + f"storage_options: {{s3: {{{name}: hunter2}}}}\n")
    assert f"'{name}' may be a secret, and a recipe is copied beside the output; known are profile, region" in fault
    assert "hunter2" not in fault


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{s3: {endpoint_url: 'http://user:HUSH@127.0.0.1:9'}}", "holds a user or a query"),
        ("{s3: {endpoint_url: 'http://127.0.0.1:9?sig=HUSH'}}", "holds a user or a query"),
        ("{s3: {endpoint_url: 'user:HUSH@127.0.0.1:9'}}", "holds a user or a query"),
        ("{sftp: {passphrase: HUSH}}", "known are username, port, timeout, tls; set FSSPEC_SFTP_PASSPHRASE in the env"),
        ("{ftp: {passwd: HUSH}}", "set FSSPEC_FTP_PASSWD in the environment, here and on workers"),
        ("{webdav: {auth: HUSH}}", "none of webdav:// is known; set FSSPEC_WEBDAV_AUTH in the environment"),
        ("{https: {headers: HUSH}}", "none of https:// is known; set it in the environment"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused_without_being_said(options: str, words: str) -> None:
    fault = say_fault(MODELS + f"storage_options: {options}\n")
    assert words in fault
    assert "HUSH" not in fault


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://key:HUSH@bucket/a", "s3://bucket/a: its URL holds a user or a password"),
        ("S3://HUSH@bucket/a", "s3://bucket/a: its URL holds a user or a password"),
        ("hf://me:HUSH@org/name", "hf://org/name: its URL holds a user or a password"),
        ("https://HUSH@host/m", "https://host/m: its URL holds a user or a password"),
        ("https://host/m?token=HUSH", "https://host/m: its URL holds a query"),
        ("s3://bucket/a?X-Amz-Signature=HUSH", "s3://bucket/a: its URL holds a query"),
        ("simplecache::s3://key:HUSH@bucket/a", "simplecache::…: a URL inside of another is not followed"),
        ("sftp://me:HUSH@host/a", "sftp://host/a: its URL holds a user or a password"),
    ],
)
@pytest.mark.parametrize("form", ["{model: '%s'}", "{model: {path: '%s'}}", "{model: 'a+%s'}"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(form: str, url: str, place: str) -> None:
    fault = say_fault(f"merge_method: linear\nmodels: [{form % url}]\n")
    assert place in fault
    assert "HUSH" not in fault


@pytest.mark.parametrize("url", ["sftp://me@host/a", "abfs://box@account.dfs.core.windows.net/a", "hf://org/name@main"])
def test_a_user_without_whom_the_place_cannot_be_named_may_stand_there(url: str) -> None:
    text = f"merge_method: linear\nmodels: [{{model: '{url}', parameters: {{weight: 1}}}}]\n"
    assert parse_recipe(text, name="r.yml").models is not None


def test_an_option_is_a_plain_value() -> None:
    assert "'profile' must be text, a number or true, not" in say_fault(
        MODELS + "storage_options: {s3: {profile: [a]}}\n"
    )
