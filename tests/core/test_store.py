import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkvpn.core.accounts import Accounts, Change, HubRecord, UserRecord
from pkvpn.core.store import MAX_KICKED, Store, StoreError, read_bridges, session_secret

H = bytes(range(20))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path))
    yield store
    store.close()


def user_of(store: Store, hub: str, name: str) -> UserRecord:
    accounts = store.load()
    found = accounts.hub(hub)
    assert found is not None
    user = accounts.user(found.id, name)
    assert user is not None
    return user


def same(one: Accounts, other: Accounts) -> bool:
    return vars(one) == vars(other)


def test_what_was_added_is_there_after_another_open(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.add_hub("Office", max_sessions=7)
    store.add_user("office", "Ann", "password", password=H)
    store.add_user("OFFICE", "guest", "anonymous")
    store.add_user("OFFICE", "bob", "certificate", certificate=b"der")
    store.add_bridge("office", "tap0", "br0")
    store.close()

    store = Store(str(tmp_path))
    accounts = store.load()
    store.close()
    hub = accounts.hub("oFFICE")
    assert hub == HubRecord(1, "Office", True, 7, 0)
    ann = accounts.user(hub.id, "ANN")
    assert ann is not None
    assert (ann.name, ann.password) == ("Ann", H)
    assert {user.name for user in accounts.users_of(hub.id)} == {"Ann", "guest", "bob"}
    assert [bridge.device for bridge in read_bridges(str(tmp_path))] == ["tap0"]


def test_changes_make_the_image_that_a_load_would_make(store: Store) -> None:
    image = Accounts()
    calls: list[Callable[[], list[Change]]] = [
        lambda: store.add_hub("a"),
        lambda: store.add_hub("b"),
        lambda: store.add_user("a", "u", "password", password=H),
        lambda: store.add_user("b", "u", "password", password=H),
        lambda: store.add_bridge("b", "tap0"),
        lambda: store.add_bridge("a", "tap1"),
        lambda: store.set_hub("a", online=False, storm_frames=5),
        lambda: store.kick(user_of(store, "a", "u").generation, 5),
        lambda: store.kick(user_of(store, "b", "u").generation, 6),
        lambda: store.set_user("a", "u", "anonymous"),
        lambda: store.delete_bridge("tap1"),
        lambda: store.add_user("a", "v", "anonymous"),
        lambda: store.delete_user("a", "u"),
        lambda: store.delete_hub("b"),
    ]
    for call in calls:
        for change in call():
            image.apply(change)
        assert same(image, store.load())
    copy = Accounts()
    copy.replace(image)
    assert same(copy, image)


def test_every_proof_of_identity_has_a_generation_of_its_own(store: Store) -> None:
    store.add_hub("a")
    generations = set()
    for _ in range(3):
        store.add_user("a", "u", "password", password=H)
        generations.add(user_of(store, "a", "u").generation)
        store.set_user("a", "u", "password", password=H)
        generations.add(user_of(store, "a", "u").generation)
        store.delete_user("a", "u")
    assert len(generations) == 6


def test_a_list_of_kicked_sessions_that_grows_too_long_ends_all_keys_of_the_user(
    store: Store,
) -> None:
    store.add_hub("a")
    store.add_user("a", "u", "password", password=H)
    before = user_of(store, "a", "u").generation
    for session in range(MAX_KICKED):
        store.kick(before, session)
    assert len(store.load().kicked) == MAX_KICKED
    (change,) = store.kick(before, MAX_KICKED)
    assert isinstance(change, UserRecord)
    assert store.load().kicked == set()
    assert store.load().user_of_generation(before) is None


@pytest.mark.parametrize("name", ["", " ", ".canary", "-x", "a b", "x" * 65, "a\0", "ä", "a/b"])
def test_a_name_that_is_none_is_refused_and_named(store: Store, name: str) -> None:
    store.add_hub("a")
    adds: list[Callable[[], object]] = [
        lambda: store.add_hub(name),
        lambda: store.add_user("a", name, "anonymous"),
        lambda: store.add_bridge("a", name),
    ]
    for add in adds:
        with pytest.raises(StoreError, match="is no name of a") as caught:
            add()
        assert repr(name) in str(caught.value)


def test_refusals_name_what_they_refuse(store: Store) -> None:
    store.add_hub("Hub")
    store.add_user("Hub", "user", "anonymous")
    store.add_bridge("Hub", "tap0")
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: store.add_hub("HUB"), "hub 'HUB' exists already"),
        (lambda: store.add_user("hub", "USER", "anonymous"), "user 'USER' of hub 'hub' exists"),
        (lambda: store.add_user("no", "u", "anonymous"), "there is no hub 'no'"),
        (lambda: store.set_user("hub", "no", "anonymous"), "hub 'hub' has no user 'no'"),
        (lambda: store.delete_user("hub", "no"), "hub 'hub' has no user 'no'"),
        (lambda: store.delete_hub("no"), "there is no hub 'no'"),
        (lambda: store.set_hub("hub", max_sessions=-1), "max_sessions is -1"),
        (lambda: store.add_bridge("hub", "tap0"), "bridge 'tap0' exists already"),
        (lambda: store.delete_bridge("tap9"), "there is no bridge 'tap9'"),
        (lambda: store.add_user("hub", "u", "ticket"), "auth is 'ticket'"),
        (lambda: store.add_user("hub", "u", "password"), "password hash of 0 bytes"),
        (lambda: store.add_user("hub", "u", "certificate"), "certificate of 0 bytes"),
    ]
    for call, text in refused:
        with pytest.raises(StoreError, match=text):
            call()
    assert len(store.load().users) == 1


def test_the_files_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = Store(str(tmp_path))
        store.add_hub("a")
        session_secret(str(tmp_path))
        names = {path.name for path in tmp_path.iterdir()}
        assert {"pkvpn.db", "pkvpn.db-wal", "session.key"} <= names
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        store.close()
    finally:
        os.umask(before)


def test_a_database_of_the_future_is_refused_by_version(tmp_path: Path) -> None:
    Store(str(tmp_path)).close()
    database = sqlite3.connect(tmp_path / "pkvpn.db")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(StoreError, match=r"pkvpn\.db has schema version 9, this program knows"):
        Store(str(tmp_path))


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "pkvpn.db").write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match=r"pkvpn\.db: file is not a database"):
        Store(str(tmp_path))
    with pytest.raises(StoreError, match="No such file"):
        Store(str(tmp_path / "absent"))


def test_a_change_by_another_process_is_noticed_once(tmp_path: Path, store: Store) -> None:
    store.load()
    store.add_hub("mine")
    assert not store.changed_by_others()
    other = Store(str(tmp_path))
    other.add_hub("theirs")
    other.close()
    assert store.changed_by_others()
    assert not store.changed_by_others()


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    secret = session_secret(str(tmp_path))
    assert len(secret) == 32
    assert session_secret(str(tmp_path)) == secret
    (tmp_path / "session.key").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"session\.key has 5 bytes, not 32"):
        session_secret(str(tmp_path))


_WRITER = """
import sys
from pkvpn.core.store import Store
store = Store(sys.argv[1])
store.add_hub("a")
number = 0
while True:
    store.add_user("a", f"u{number}", "password", password=bytes(20))
    sys.stdout.write(f"u{number}\\n")
    sys.stdout.flush()
    number += 1
"""


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill_that_follows_at_once(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for wanted in (1, 3, 10):
        state = tmp_path / str(wanted)
        state.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(state)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            acknowledged = [writer.stdout.readline().strip() for _ in range(wanted)]
            writer.send_signal(signal.SIGKILL)
        store = Store(str(state))
        found = {user.name for user in store.load().users.values()}
        store.close()
        assert set(acknowledged) <= found
