"""The table of known flows against a simple model."""

from hypothesis import given
from hypothesis import strategies as st

from pkvpn.edge import flows
from pkvpn.edge.flows import Flows

CONN = st.integers(1, 3)
KEY = st.sampled_from([b"k" * 12, b"l" * 12])
STEP = st.one_of(
    st.tuples(st.just("add"), CONN, KEY, CONN, st.integers(1, 2)),
    st.tuples(st.just("remove"), CONN, KEY),
    st.tuples(st.just("remove_all"), CONN),
    st.tuples(st.just("close"), CONN),
    st.tuples(st.just("remove_others"), st.integers(1, 2)),
    st.tuples(st.just("clear")),
)


@given(st.lists(STEP))
def test_the_table_holds_what_was_said_and_not_taken_back(steps: list[tuple[object, ...]]) -> None:
    table: Flows[str] = Flows()
    model: dict[tuple[int, bytes], tuple[int, int]] = {}
    for step in steps:
        match step:
            case ("add", int(conn), bytes(key), int(to), int(epoch)):
                assert table.add(conn, key, to, f"target {to}", epoch)
                model[conn, key] = (to, epoch)
            case ("remove", int(conn), bytes(key)):
                table.remove(conn, key)
                model.pop((conn, key), None)
            case ("remove_all" | "close", int(conn)):
                getattr(table, str(step[0]))(conn)
                model = {
                    entry: said
                    for entry, said in model.items()
                    if entry[0] != conn and said[0] != conn
                }
            case ("remove_others", int(epoch)):
                old = [entry for entry, said in model.items() if said[1] != epoch]
                assert table.remove_others(epoch) == len(old)
                for entry in old:
                    del model[entry]
            case _:
                assert table.clear() == len(model)
                model = {}
        assert sorted(table) == sorted(model)
        assert len(table) == len(model)
        for conn in (1, 2, 3):
            assert table.table(conn) == {
                key: f"target {to}" for (source, key), (to, _) in model.items() if source == conn
            }


def test_a_connection_keeps_the_same_dictionary() -> None:
    table: Flows[str] = Flows()
    held = table.table(1)
    table.add(1, b"k" * 12, 2, "two", 1)
    assert held == {b"k" * 12: "two"}
    table.remove_all(2)
    assert held == {}
    assert table.table(1) is held


def test_a_connection_has_a_bounded_number_of_flows() -> None:
    table: Flows[str] = Flows()
    for number in range(flows.MAX_FLOWS):
        assert table.add(1, number.to_bytes(12, "big"), 2, "two", 1)
    assert not table.add(1, b"k" * 12, 2, "two", 1)
    assert table.add(1, bytes(12), 3, "three", 1)  # the old one is renewed
    assert table.add(2, b"k" * 12, 1, "one", 1)
