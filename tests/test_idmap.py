"""Translation of ids: the rules of virtiofsd, by its documentation's words and examples."""

from __future__ import annotations

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.fs.idmap import IdMap, namespace_rules, parse_translations

NO_ID = 0xFFFFFFFF
IDS = st.one_of(st.integers(0, 300), st.integers(0, NO_ID))


def test_without_rules_every_id_stays_what_it_is() -> None:
    ids = parse_translations([])
    assert ids.identity
    for number in (0, 1, 1000, 65534, NO_ID - 1, NO_ID):
        assert ids.to_host(number) == ids.to_guest(number) == number


def test_the_example_of_the_documentation() -> None:
    uids = parse_translations(["squash-guest:0:1001:4294967295", "host:1001:1000:1"])
    assert not uids.identity
    assert [uids.to_host(n) for n in (0, 1000, 1001, NO_ID - 1)] == [1001] * 4
    assert [uids.to_guest(n) for n in (1000, 1001, 1002, 0)] == [1000, 1000, 1002, 0]
    assert uids.to_host(NO_ID) == NO_ID


def test_a_range_keeps_its_order_and_ends_where_it_ends() -> None:
    ids = parse_translations(["guest:100:5000:10"])
    assert [ids.to_host(n) for n in (99, 100, 109, 110, 5000)] == [99, 5000, 5009, 110, 5000]
    assert ids.to_guest(5000) == 5000  # one direction says nothing of the other
    ids = parse_translations(["host:100:5000:10"])
    assert [ids.to_guest(n) for n in (99, 100, 109, 110)] == [99, 5000, 5009, 110]
    assert ids.to_host(5000) == 5000


def test_map_is_for_both_directions() -> None:
    ids = parse_translations(["map:0:100000:65536"])
    assert [ids.to_host(n) for n in (0, 65535, 65536)] == [100000, 165535, 65536]
    assert [ids.to_guest(n) for n in (99999, 100000, 165535, 165536)] == [99999, 0, 65535, 165536]


def test_many_become_one() -> None:
    ids = parse_translations(["squash-guest:10:7:5", "squash-host:20:8:2"])
    assert [ids.to_host(n) for n in (9, 10, 14, 15)] == [9, 7, 7, 15]
    assert [ids.to_guest(n) for n in (19, 20, 21, 22)] == [19, 8, 8, 22]


def test_only_two_users_are_let_through() -> None:
    rules = ["forbid-guest:0:1000", "map:1000:1000:1", "forbid-guest:1001:999", "map:2000:2000:1"]
    ids = parse_translations([*rules, "forbid-guest:2001:4294965294"])
    assert (ids.to_host(1000), ids.to_host(2000)) == (1000, 2000)
    for number in (0, 999, 1001, 1999, 2001, NO_ID - 1):
        with pytest.raises(PermissionError, match=f"id {number}: .*forbid-guest") as caught:
            ids.to_host(number)
        assert caught.value.errno == errno.EPERM
        assert ids.to_guest(number) == number
    assert ids.to_host(NO_ID) == NO_ID


def test_the_order_of_rules_does_not_matter() -> None:
    ids = parse_translations(["guest:30:1:1", "guest:10:2:1", "guest:20:3:1"])
    assert [ids.to_host(n) for n in (10, 11, 20, 21, 30, 31)] == [2, 11, 3, 21, 1, 31]


@pytest.mark.parametrize(
    ("rules", "common"),
    [
        (["guest:0:5:10", "squash-guest:9:5:1"], "guest's id 9;"),
        (["forbid-guest:1001:1999", "map:2000:2000:1"], "guest's id 2000;"),
        (["map:0:100:10", "host:105:0:100"], "host's id 105 to 109;"),
        (["squash-host:5:0:1", "squash-host:5:1:1"], "host's id 5;"),
        (["guest:5:0:1", "guest:0:100:10"], "guest's id 5;"),
    ],
)
def test_two_rules_for_one_id_are_an_error_that_names_both(rules: list[str], common: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_translations(rules)
    for part in (*rules, common, "not the last of them"):
        assert part in str(caught.value)


def test_the_same_source_in_different_directions_is_no_conflict() -> None:
    ids = parse_translations(["guest:5:6:1", "host:5:7:1"])
    assert (ids.to_host(5), ids.to_guest(5)) == (6, 7)
    parse_translations(["map:0:100:10", "guest:10:100:10"])  # targets may coincide


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("", "the types are guest, host, map"),
        ("0:1:2", "the types are guest"),
        ("Guest:0:1:2", "the types are guest"),
        ("forbid-host:0:1", "the types are guest"),
        ("guest:0:1", "is not guest:SOURCE:TARGET:COUNT"),
        ("guest:0:1:2:3", "is not guest:SOURCE:TARGET:COUNT"),
        ("forbid-guest:0:1:2", "is not forbid-guest:SOURCE:COUNT"),
        ("guest:a:1:2", "SOURCE is a number from 0 to 4294967295, not 'a'"),
        ("guest:0::2", "TARGET is a number"),
        ("guest:0:1:-1", "COUNT is a number"),
        ("guest:0:1:+1", "COUNT is a number"),
        ("guest:0: 1:1", "TARGET is a number"),
        ("guest:0:1_0:1", "TARGET is a number"),
        ("guest:0:٣:1", "TARGET is a number"),
        ("guest:0:1:99999999999999999999", "COUNT is a number"),
        ("guest:0:1:0", "is for no id"),
        ("forbid-guest:1:4294967295", "from 1 on there are 4294967294"),
        ("forbid-guest:4294967295:1", "from 4294967295 on there are 0"),
        ("guest:0:1:4294967295", "leads beyond the last id, 4294967294"),
        ("squash-guest:0:4294967295:1", "leads beyond the last id"),
    ],
)
def test_a_rule_that_cannot_be_is_named_with_the_reason(rule: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        parse_translations(["map:70:70:1", rule])
    assert repr(rule) in str(caught.value)


@st.composite
def rule_lists(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    kinds = st.sampled_from(["guest", "host", "map", "squash-guest", "squash-host", "forbid-guest"])
    row = st.tuples(kinds, st.integers(0, 200), st.integers(0, 200), st.integers(1, 40))
    return draw(st.lists(row, max_size=6))


def by_search(rules: list[tuple[str, int, int, int]], number: int, kinds: dict[str, bool]) -> list[int | None]:
    """Every answer that the rules give for an id, read one by one."""
    found: list[int | None] = []
    for kind, source, target, count in rules:
        if kind not in kinds:
            continue
        if kinds[kind]:
            source, target = target, source
        if source <= number < source + count:
            squashed = kind.startswith("squash")
            found.append(None if kind == "forbid-guest" else target if squashed else target + number - source)
    return found


GUEST = {"guest": False, "map": False, "squash-guest": False, "forbid-guest": False}
HOST = {"host": False, "squash-host": False, "map": True}


@given(rule_lists(), st.lists(IDS, min_size=1))
def test_every_id_is_what_a_search_through_the_rules_says(
    rules: list[tuple[str, int, int, int]], numbers: list[int]
) -> None:
    words = [f"{k}:{s}:{c}" if k == "forbid-guest" else f"{k}:{s}:{t}:{c}" for k, s, t, c in rules]
    clash = any(len(by_search(rules, number, kinds)) > 1 for number in range(260) for kinds in (GUEST, HOST))
    try:
        ids: IdMap | None = parse_translations(words)
    except ValueError:
        ids = None
    assert (ids is None) == clash
    if ids is None:
        return
    for number in numbers:
        (wanted,) = by_search(rules, number, GUEST) or [number]
        try:
            assert ids.to_host(number) == wanted
        except PermissionError:
            assert wanted is None
        (wanted,) = by_search(rules, number, HOST) or [number]
        assert ids.to_guest(number) == wanted


@given(IDS, st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000))
def test_map_leads_back(number: int, guest: int, host: int, count: int) -> None:
    ids = parse_translations([f"map:{guest}:{host}:{count}"])
    if guest <= number < guest + count:
        assert ids.to_guest(ids.to_host(number)) == number
    if host <= number < host + count:
        assert ids.to_host(ids.to_guest(number)) == number


def test_a_namespace_of_one_id_shows_every_file_as_its_own() -> None:
    ids = parse_translations(namespace_rules([(0, 1000, 1)], 0))
    assert [ids.to_guest(number) for number in (0, 999, 1000, 1001, 65534, 4294967294)] == [0] * 6
    assert ids.to_host(0) == 1000


def test_ranges_of_a_namespace_map_one_to_one_and_the_rest_is_its_own() -> None:
    ids = parse_translations(namespace_rules([(0, 1000, 1), (1, 100000, 65536)], 0))
    assert [ids.to_guest(number) for number in (1000, 100000, 165535, 165536, 0)] == [0, 1, 65536, 0, 0]
    assert [ids.to_host(number) for number in (0, 1, 65536)] == [1000, 100000, 165535]


def test_the_first_namespace_needs_no_translation() -> None:
    assert namespace_rules([(0, 0, 4294967295)], 0) == ()
