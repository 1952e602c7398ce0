"""A file that is only copied is sent from a file: whatever is read of it, and however often, it is those bytes."""

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import SourceChanged
from mergemill.engine.storage import copied, ranges
from mergemill.engine.storage.copied import Copied
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.storage.store import ENVIRONMENT

DATA = bytes(range(251)) * 11
STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 3000)),
    st.tuples(st.sampled_from(["from the start", "from here", "from the end"]), st.integers(-100, 3000)),
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of which there are several in a small file."""
    for module in (copied, ranges):
        monkeypatch.setattr(module, "PIECE_BYTES", 700)


def make_copied(path: Path, data: bytes = DATA) -> Copied:
    path.write_bytes(data)
    return Copied(pin_file(path), ENVIRONMENT)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12))
@pytest.mark.usefixtures("small_pieces")
def test_it_reads_like_the_file_itself(steps: list[tuple[str, int]], tmp_path: Path) -> None:
    ours, plain = io.BufferedReader(make_copied(tmp_path / "a").open()), io.BytesIO(DATA)
    whence = {"from the start": io.SEEK_SET, "from here": io.SEEK_CUR, "from the end": io.SEEK_END}
    for kind, number in steps:
        if kind == "read":
            assert ours.read(number) == plain.read(number)
        else:
            at = max(0, {"from the start": 0, "from here": plain.tell(), "from the end": len(DATA)}[kind] + number)
            assert ours.seek(at) == plain.seek(at)
            ours.seek(0, whence[kind])
            plain.seek(0, whence[kind])
        assert ours.tell() == plain.tell()


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_changes_while_it_is_sent_is_noticed_and_kept_in_mind(tmp_path: Path) -> None:
    file = make_copied(tmp_path / "a").open()
    assert file.read(100) == DATA[:100]
    (tmp_path / "a").write_bytes(DATA + b"more")
    with pytest.raises(SourceChanged) as found:
        io.BufferedReader(file).read()
    assert file.failed is found.value


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("other", "same"),
    [(DATA, True), (DATA[:-1], False), (DATA[:-1] + b"?", False), (b"?" + DATA[1:], False), (None, False)],
)
def test_only_the_same_bytes_are_it(other: bytes | None, same: bool, tmp_path: Path) -> None:
    if other is not None:
        (tmp_path / "b").write_bytes(other)
    assert make_copied(tmp_path / "a").is_at(str(tmp_path / "b"), ENVIRONMENT) is same


def test_an_empty_file_is_read_to_its_end(tmp_path: Path) -> None:
    assert make_copied(tmp_path / "a", b"").open().read() == b""
