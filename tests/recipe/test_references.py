"""References to models: where the path ends, and what reads back as what."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mergemill.engine.recipe import ModelRef

PARTS = {
    "org/name": ("org/name", None, None),
    "gpt2": ("gpt2", None, None),
    "org/name@rev": ("org/name", "rev", None),
    "org/name@refs/pr/3": ("org/name", "refs/pr/3", None),
    "org/name@rev+l/o@rev2": ("org/name", "rev", "l/o@rev2"),
    "org/name+l/o": ("org/name", None, "l/o"),
    "hf://org/name@rev": ("hf://org/name", "rev", None),
    "hf://gpt2@rev": ("hf://gpt2", "rev", None),
    "s3://bucket/a/b": ("s3://bucket/a/b", None, None),
    "sftp://me@host/a": ("sftp://me@host/a", None, None),
    "sftp://me@host": ("sftp://me@host", None, None),
    "sftp://me@host/a@v1": ("sftp://me@host/a", "v1", None),
    "s3://bucket/a+s3://bucket/lora": ("s3://bucket/a", None, "s3://bucket/lora"),
    "git+ssh://user@host/a": ("git+ssh://user@host/a", None, None),
    "/data/m@v2": ("/data/m@v2", None, None),
    "./m@v2": ("./m@v2", None, None),
    "~/m@v2+~/lora": ("~/m@v2", None, "~/lora"),
    "file:///data/m@v2": ("file:///data/m@v2", None, None),
    "models@v1/llama": ("models@v1/llama", None, None),
    "a@b@c": ("a@b", "c", None),
}


@pytest.mark.parametrize(("short", "parts"), PARTS.items())
def test_short_forms(short, parts):
    ref = ModelRef.model_validate(short)
    assert (ref.path, ref.revision, ref.lora and str(ref.lora)) == parts
    assert str(ref) == short


@pytest.mark.parametrize(
    "mapping",
    [
        {"model": {"path": "org/a", "revision": "r"}, "lora": {"path": "l", "revision": "s"}},
        {"model": "org/a@r", "lora": "l@s"},
        {"model": "org/a@r+l@s"},
        {"path": "org/a", "revision": "r", "lora": {"path": "l", "revision": "s"}},
    ],
)
def test_mapping_forms_say_the_same(mapping):
    assert ModelRef.model_validate(mapping) == ModelRef.model_validate("org/a@r+l@s")


def test_a_path_in_a_mapping_is_literal():
    ref = ModelRef.model_validate({"model": {"path": "c++/m@1"}})
    assert (ref.path, ref.revision, ref.lora) == ("c++/m@1", None, None)
    assert ref.model_dump() == {"model": {"path": "c++/m@1"}}


def test_an_override_keeps_the_mapping_form():
    ref = ModelRef(path="org/a", lora=ModelRef(path="l"), override_architecture="X")
    assert str(ref) == "org/a+l"
    assert ref.model_dump() == {
        "model": {"path": "org/a"},
        "lora": {"path": "l"},
        "override_architecture": "X",
    }


def test_a_lora_carries_no_lora():
    with pytest.raises(ValidationError, match="a LoRA has only a path and a revision"):
        ModelRef(path="a", lora=ModelRef(path="b", lora=ModelRef(path="c")))


WORDS = st.text(alphabet="ab/@+:.~ -é", min_size=1).filter(lambda text: text.strip() and "://" not in text)
REFS = st.builds(
    ModelRef,
    path=WORDS,
    revision=st.none() | WORDS,
    lora=st.none() | st.builds(ModelRef, path=WORDS, revision=st.none() | WORDS),
    override_architecture=st.none() | WORDS,
)


@given(REFS)
@settings(deadline=None)
def test_every_reference_reads_back_from_what_it_dumps(ref):
    assert TypeAdapter(ModelRef).validate_python(ref.model_dump(mode="json")) == ref
