import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.core.accounts import Accounts, Change, HubRecord, Kicked, UserRecord
from pkvpn.core.control import Control, Page, Refused, SessionName, page_key
from pkvpn.core.store import Store
from pkvpn.protocol.hashes import user_key
from pkvpn.watchdog.control import MAX_LINE


class Core:
    """A `Live` that remembers what it was told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.replaced = 0

    def apply(self, changes: list[Change]) -> None:
        self.changes += changes

    def replace(self, accounts: Accounts) -> None:
        self.replaced += 1

    def sessions(self, hub_id: int | None, page: Page) -> list[dict[str, Any]]:
        shown = [{"hub": "T", "name": f"SID-U-{i}", "padding": "x" * 500} for i in range(5000)]
        return page.of((page_key(one["hub"], one["name"]), one) for one in shown)

    def sessions_not_shown(self, certificate: str) -> list[str]:
        return [f"T/SID-U-{i}" for i in range(300)] if certificate == "new" else []

    def sessions_of_users(self, hub_id: int) -> dict[str, int]:
        return {"u": 300}

    def connections(self, page: Page) -> list[dict[str, Any]]:
        return page.of((page_key(f"{i:04}"), {"id": f"{i:04}"}) for i in range(5000))

    def sessions_named(self, hub_id: int, name: str) -> list[SessionName]:
        return [SessionName(1, 7, "SID-U-7")] if name.upper() == "SID-U-7" else []

    def macs(self, hub_id: int, page: Page) -> list[dict[str, Any]]:
        macs = [{"mac": f"02:00:00:00:{i // 3:04}", "vlan": i % 3 or None} for i in range(5000)]
        return page.of((page_key(one["mac"], one["vlan"]), one) for one in macs)

    def hub(self, hub_id: int) -> dict[str, Any]:
        return {"sessions": 300}

    def bridges(self) -> dict[str, str]:
        return {"tap0": "open"}

    def quarantine(self) -> list[dict[str, Any]]:
        return [{"name": "t/u", "why": "it kills", "left": 10.0}]

    def lift(self, name: str) -> bool:
        return name == "T/u"

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


def test_who_is_in_quarantine_is_told_and_let_go(store: Store) -> None:
    control = Control(store, Core())
    assert control.answer("quarantine.list", {})[0]["name"] == "t/u"
    assert control.answer("quarantine.lift", {"name": "T/u"}) == {"lifted": "T/u"}
    with pytest.raises(Refused, match="'T/v' is not in quarantine"):
        control.answer("quarantine.lift", {"name": "T/v"})


def all_pages(control: Control, verb: str, keys: tuple[str, ...], **args: Any) -> list[Any]:
    found: list[Any] = []
    while page := control.answer(verb, args):
        assert len(json.dumps({"ok": True, "result": page})) < MAX_LINE
        found += page
        last = ("" if page[-1][key] is None else str(page[-1][key]) for key in keys)
        args["after"] = "\0".join(last)
    return found


def test_long_lists_come_in_pages(store: Store) -> None:
    control = Control(store, Core())
    sessions = all_pages(control, "session.list", ("hub", "name"))
    assert {one["name"] for one in sessions} == {f"SID-U-{i}" for i in range(5000)}
    assert len(sessions) == len(all_pages(control, "connection.list", ("id",))) == 5000
    assert len(control.answer("session.list", {"limit": 5})) == 5
    control.answer("hub.add", {"name": "T"})
    macs = all_pages(control, "mac.list", ("mac", "vlan"), hub="T")
    assert len({(one["mac"], one["vlan"]) for one in macs}) == len(macs) == 5000
    for limit in (0, 1000):
        with pytest.raises(Refused):
            control.answer("session.list", {"limit": limit})


@pytest.mark.parametrize("live", [None, Core()], ids=["down", "running"])
def test_five_thousand_users_and_hubs_come_in_pages(store: Store, live: Core | None) -> None:
    accounts = Accounts()
    for number in range(1, 5001):
        accounts.apply(HubRecord(number, f"hub-{number}", True, 0, 0))
        name = f"user-{number}" + "x" * 200
        accounts.apply(UserRecord(number, 1, name, "anonymous", b"", b"", number))
    control = Control(store, live, accounts)
    for verb, name, more in (("user.list", "user", {"hub": "hub-1"}), ("hub.list", "hub", {})):
        found = [one["name"].rstrip("x") for one in all_pages(control, verb, ("name",), **more)]
        assert sorted(found) == sorted(f"{name}-{number}" for number in range(1, 5001))


def test_what_comes_and_goes_between_two_pages_moves_nothing_else(store: Store) -> None:
    control = Control(store)
    for name in "bdfh":
        control.answer("hub.add", {"name": name})
    first = control.answer("hub.list", {"limit": 2})
    control.answer("hub.delete", {"name": first[-1]["name"]})
    for name in "ag":
        control.answer("hub.add", {"name": name})
    rest = all_pages(control, "hub.list", ("name",), after=first[-1]["name"])
    assert [hub["name"] for hub in first + rest] == list("bdfgh")


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
