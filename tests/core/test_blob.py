import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.core.blob import MAX_SIZE, Blob, BlobError, Stage, decode
from pkvpn.protocol.messages import Direction

U8 = st.integers(0, 255)
RANDOM = st.binary(min_size=20, max_size=20)
EARLY = st.builds(
    Blob, st.sampled_from([Stage.FRESH, Stage.GREETED, Stage.CLOSING]), U8, U8, RANDOM
)
IN_SESSION = st.builds(
    Blob,
    st.just(Stage.IN_SESSION),
    U8,
    U8,
    RANDOM,
    RANDOM,
    st.sampled_from(Direction),
    st.floats(0, 1e9),
    st.just(b"") | st.binary(min_size=16, max_size=16).filter(any),
    st.integers(0, 2**32 - 1),
    st.text(max_size=40),
)


@given(EARLY | IN_SESSION)
def test_a_blob_comes_back_as_it_was(blob: Blob) -> None:
    data = blob.encode()
    assert len(data) <= MAX_SIZE
    assert decode(data) == blob


@given(IN_SESSION, st.data())
def test_a_blob_that_is_cut_or_longer_is_none(blob: Blob, data: st.DataObject) -> None:
    encoded = blob.encode()
    size = data.draw(st.integers(1, len(encoded) - 1))
    for wrong in (encoded[:size], encoded + b"x", b"\x09" + encoded[1:]):
        if wrong == encoded[:24]:
            continue
        with pytest.raises(BlobError):
            decode(wrong)


@given(st.binary(max_size=150))
def test_whatever_the_bytes_the_only_error_is_blob_error(data: bytes) -> None:
    try:
        decode(data)
    except BlobError:
        pass


def test_the_longest_name_of_a_client_fits() -> None:
    blob = Blob(Stage.IN_SESSION, client="é" * 255)
    assert decode(blob.encode()).client == "é" * 100


def test_no_blob_is_a_fresh_connection() -> None:
    assert decode(b"") == Blob()
