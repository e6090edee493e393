from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.core.accounts import Accounts, Change, Kicked
from pkvpn.core.control import Control, Refused, SessionName
from pkvpn.core.store import Store
from pkvpn.protocol.hashes import user_key


class Core:
    """A `Live` that remembers what it was told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.replaced = 0

    def apply(self, changes: list[Change]) -> None:
        self.changes += changes

    def replace(self, accounts: Accounts) -> None:
        self.replaced += 1

    def sessions(self, hub_id: int | None) -> list[dict[str, Any]]:
        return [{"name": f"SID-U-{i}", "user": "u"} for i in range(300)]

    def sessions_named(self, hub_id: int, name: str) -> list[SessionName]:
        return [SessionName(1, 7, "SID-U-7")] if name.upper() == "SID-U-7" else []

    def macs(self, hub_id: int) -> list[dict[str, Any]]:
        return [{"mac": f"02:00:00:00:00:0{i // 3}"} for i in range(9)]

    def hub(self, hub_id: int) -> dict[str, Any]:
        return {"sessions": 300}

    def bridges(self) -> dict[str, str]:
        return {"tap0": "open"}

    def status(self) -> dict[str, Any]:
        return {"sessions": 300}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path))
    yield store
    store.close()


def test_a_password_is_stored_as_its_hash_only(store: Store, tmp_path: Path) -> None:
    control = Control(store)
    control.answer("hub.add", {"name": "T"})
    control.answer("user.add", {"hub": "t", "name": "u1", "password": "a very secret password"})
    (user,) = store.load().users.values()
    assert user.password == user_key("a very secret password", "u1")
    for path in tmp_path.iterdir():
        assert b"a very secret" not in path.read_bytes()


def test_the_verbs_work_without_a_core(store: Store) -> None:
    control = Control(store)
    assert control.answer("hub.add", {"name": "T", "max_sessions": 3})["max_sessions"] == 3
    assert control.answer("hub.set", {"name": "t", "online": False})["online"] is False
    control.answer("user.add", {"hub": "T", "name": "ann", "auth": "anonymous"})
    assert control.answer("user.list", {"hub": "T"}) == [{"name": "ann", "auth": "anonymous"}]
    control.answer("user.passwd", {"hub": "T", "name": "ANN", "password": "x"})
    assert control.answer("user.list", {"hub": "T"}) == [{"name": "ann", "auth": "password"}]
    assert control.answer("bridge.add", {"hub": "T", "device": "tap0"})["hub"] == "T"
    assert control.answer("hub.show", {"name": "T"})["bridges"] == ["tap0"]
    assert len(control.answer("bridge.list", {})) == 1
    assert control.answer("status", {})["running"] is False
    control.answer("bridge.delete", {"device": "tap0"})
    control.answer("user.delete", {"hub": "T", "name": "ann"})
    control.answer("hub.delete", {"name": "T"})
    assert control.answer("hub.list", {}) == []


@pytest.mark.parametrize("verb", ["session.list", "session.kick", "mac.list"])
def test_verbs_about_sessions_say_that_nothing_runs(store: Store, verb: str) -> None:
    Control(store).answer("hub.add", {"name": "T"})
    args = {"hub": "T"} | ({"name": "x"} if verb == "session.kick" else {})
    with pytest.raises(Refused, match=f"{verb}: the service is not running"):
        Control(store).answer(verb, args)


def test_a_kick_is_on_disk_before_the_core_hears_of_it(store: Store) -> None:
    core = Core()
    control = Control(store, core)
    control.answer("hub.add", {"name": "T"})
    on_disk: list[set[tuple[int, int]]] = []

    def look(changes: list[Change]) -> None:
        on_disk.append(store.load().kicked)

    core.apply = look  # type: ignore[method-assign]
    assert control.answer("session.kick", {"hub": "T", "name": "sid-u-7"}) == {
        "hub": "T",
        "kicked": ["SID-U-7"],
    }
    assert on_disk == [{(1, 7)}]


def test_a_core_is_told_every_change(store: Store) -> None:
    core = Core()
    control = Control(store, core)
    control.answer("hub.add", {"name": "T"})
    control.answer("user.add", {"hub": "T", "name": "u", "password": "p"})
    control.answer("session.kick", {"hub": "T", "name": "SID-U-7"})
    image = Accounts()
    for change in core.changes:
        image.apply(change)
    assert vars(image) == vars(store.load())
    assert core.changes[-1] == Kicked(1, 7)
    assert control.answer("user.list", {"hub": "T"})[0]["sessions"] == 300
    assert control.answer("bridge.add", {"hub": "T", "device": "tap0"})["state"] == "open"
    assert "reload" in control.answer("bridge.add", {"hub": "T", "device": "tap1"})["state"]
    assert "reload" in control.answer("bridge.delete", {"device": "tap1"})["note"]


def test_long_lists_come_in_pages(store: Store) -> None:
    control = Control(store, Core())
    first = control.answer("session.list", {})
    second = control.answer("session.list", {"after": first[-1]["name"]})
    assert [one["name"] for one in first + second] == [f"SID-U-{i}" for i in range(300)]
    assert len(control.answer("session.list", {"limit": 5})) == 5
    control.answer("hub.add", {"name": "T"})
    assert len(control.answer("mac.list", {"hub": "T", "limit": 2})) == 3  # all of one address
    for args in ({"limit": 0}, {"limit": 1000}, {"after": "gone"}):
        with pytest.raises(Refused):
            control.answer("session.list", args)


def test_what_another_process_changed_is_seen(store: Store, tmp_path: Path) -> None:
    core = Core()
    control = Control(store, core)
    other = Store(str(tmp_path))
    other.add_hub("theirs")
    other.close()
    assert [hub["name"] for hub in control.answer("hub.list", {})] == ["theirs"]
    assert core.replaced == 1


def test_the_numbers_0_and_1_are_numbers(store: Store) -> None:
    control = Control(store, Core())
    control.answer("hub.add", {"name": "T", "max_sessions": 1})
    assert control.answer("hub.set", {"name": "T", "storm_frames": 0})["max_sessions"] == 1


@pytest.mark.parametrize(
    ("verb", "args", "text"),
    [
        ("hub.paint", {}, "unknown verb 'hub.paint'"),
        ("_apply", {}, "unknown verb"),
        ("hub.add", {}, "hub.add: argument 'name' is missing"),
        ("hub.add", {"name": "T", "colour": 1}, "unknown argument 'colour'"),
        ("hub.add", {"name": 5}, "argument 'name' is not a text"),
        ("hub.add", {"name": "T", "max_sessions": True}, "is not a number"),
        ("hub.add", {"name": "T", "online": 1}, "is not a flag"),
        ("hub.add", {"name": "a b"}, "'a b' is no name of a hub"),
        ("hub.set", {"name": "T"}, "nothing to set"),
        ("hub.show", {"name": "no"}, "there is no hub 'no'"),
        ("user.add", {"hub": "H", "name": "u"}, "needs a password"),
        ("user.add", {"hub": "H", "name": "u", "password": ""}, "needs a password"),
        ("user.add", {"hub": "H", "name": "u", "password": "x" * 256}, "longer than 255"),
        ("user.add", {"hub": "H", "name": "u", "password": "a\0b"}, "NUL"),
        ("user.add", {"hub": "H", "name": "u", "auth": "anonymous", "password": "x"}, "has no"),
        ("user.add", {"hub": "H", "name": "u", "certificate": "!"}, "neither PEM nor"),
        ("user.add", {"hub": "H", "name": "u", "certificate": "AAAA"}, "no X.509"),
        ("user.add", {"hub": "H", "name": "u", "auth": "ntlm"}, "auth is 'ntlm'"),
        ("user.passwd", {"hub": "H", "name": "u", "password": "x"}, "has no user 'u'"),
        ("session.kick", {"hub": "H", "name": "x"}, "hub 'H' has no session 'x'"),
    ],
)
def test_refusals_name_what_is_wrong(
    store: Store, verb: str, args: dict[str, Any], text: str
) -> None:
    control = Control(store, Core())
    control.answer("hub.add", {"name": "H"})
    with pytest.raises(Refused) as caught:
        control.answer(verb, args)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("user.add", {"hub": "T", "name": "\ud800", "password": "x"}),
        ("user.add", {"hub": "T", "name": "u", "password": "\ud800"}),
        ("user.add", {"hub": "T", "name": "u", "certificate": "-----BEGIN \ud800"}),
        ("user.delete", {"hub": "T", "name": "\udcff"}),
        ("bridge.delete", {"device": "\ud800"}),
    ],
)
def test_half_a_character_is_refused(store: Store, verb: str, args: dict[str, Any]) -> None:
    control = Control(store)
    control.answer("hub.add", {"name": "T"})
    with pytest.raises(Refused, match="no UTF-8"):
        control.answer(verb, args)


def test_a_password_may_be_what_is_no_text_at_a_terminal(store: Store) -> None:
    control = Control(store)
    control.answer("hub.add", {"name": "T"})
    control.answer("user.add", {"hub": "T", "name": "u", "password": "\udcff"})
    assert store.load().users[1].password == user_key("\udcff", "u")
