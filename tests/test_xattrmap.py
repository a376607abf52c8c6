"""Mapping of extended attributes' names: the rules of virtiofsd, by its documentation's worked examples."""

from __future__ import annotations

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.fs.xattrmap import XattrMap

BAD, UNSUPPORTED = errno.EPERM, errno.EOPNOTSUPP


def host(rules: XattrMap, name: bytes) -> bytes | int:
    try:
        return rules.to_host(name)
    except OSError as error:
        return error.errno or 0


@pytest.mark.parametrize("text", [":prefix:all::user.virtiofs.::bad:all:::", ":map::user.virtiofs.:"])
def test_example_1_everything_gets_a_prefix(text: str) -> None:
    rules = XattrMap.parse(text)
    for name in (b"user.a", b"trusted.a", b"security.capability", b"user.virtiofs.x", b"\xff"):
        assert host(rules, name) == b"user.virtiofs." + name
        assert rules.to_client(b"user.virtiofs." + name) == name
    for name in (b"user.a", b"security.selinux", b"user.virtiofs"):
        assert rules.to_client(name) is None


EXAMPLE_2 = """/prefix/all/trusted./user.virtiofs./
            /bad/server//trusted./
            /bad/client/user.virtiofs.//
            /ok/all///"""


@pytest.mark.parametrize("text", [EXAMPLE_2, "/map/trusted./user.virtiofs./"])
def test_example_2_trusted_gets_a_prefix_and_the_rest_goes_through(text: str) -> None:
    rules = XattrMap.parse(text)
    assert host(rules, b"trusted.overlay.opaque") == b"user.virtiofs.trusted.overlay.opaque"
    assert rules.to_client(b"user.virtiofs.trusted.overlay.opaque") == b"trusted.overlay.opaque"
    assert rules.to_client(b"trusted.on-the-host") is None
    assert host(rules, b"user.virtiofs.trusted.overlay.opaque") == BAD
    assert host(rules, b"user.virtiofs.") == BAD
    assert host(rules, b"user.mine") == rules.to_client(b"user.mine") == b"user.mine"


def test_example_3_security_is_hidden_and_everything_else_allowed() -> None:
    rules = XattrMap.parse("/bad/all/security./security./\n            /ok/all///")
    assert host(rules, b"security.selinux") == BAD
    assert rules.to_client(b"security.selinux") is None
    assert host(rules, b"user.a") == rules.to_client(b"user.a") == b"user.a"
    assert host(rules, b"securit") == b"securit"


@pytest.mark.parametrize(
    ("rule", "sent", "listed"),
    [
        (":prefix:client:trusted.:user.virtiofs.:", b"user.virtiofs.trusted.a", b"user.virtiofs.b"),
        (":prefix:server::user.virtiofs.:", b"trusted.a", b"b"),
        (":prefix:all:trusted.:user.virtiofs.:", b"user.virtiofs.trusted.a", b"b"),
        (":ok:client:trusted.::", b"trusted.a", b"user.virtiofs.b"),
        (":ok:server::user.virtiofs.:", b"trusted.a", b"user.virtiofs.b"),
        (":bad:server::user.virtiofs.:", b"trusted.a", None),
        (":bad:client:trusted.::", BAD, b"user.virtiofs.b"),
        (":unsupported:all:trusted.:user.virtiofs.:", UNSUPPORTED, None),
        (":unsupported:client:trusted.::", UNSUPPORTED, b"user.virtiofs.b"),
    ],
)
def test_a_rule_works_in_its_scope(rule: str, sent: bytes | int, listed: bytes | None) -> None:
    rules = XattrMap.parse(rule + ":ok:all:::")
    assert host(rules, b"trusted.a") == sent
    assert rules.to_client(b"user.virtiofs.b") == listed
    assert host(rules, b"other") == rules.to_client(b"other") == b"other"


def test_the_first_rule_that_matches_decides() -> None:
    rules = XattrMap.parse(":ok:all:user.open:user.open: :bad:all:user.:user.: :ok:all:::")
    assert host(rules, b"user.open.a") == b"user.open.a"
    assert host(rules, b"user.shut") == BAD
    assert rules.to_client(b"user.open.a") == b"user.open.a"
    assert rules.to_client(b"user.shut") is None


@pytest.mark.parametrize(
    "text",
    [
        ":bad:all:a:b::ok:all:::",
        "  :bad:all:a:b: \t\n:ok:all::: \n",
        "|bad|all|a|b|,ok,all,,,",
        "1bad1all1a1b1 2ok2all222",
        "äbadäalläaäbä/ok/all///",
    ],
)
def test_every_rule_has_its_own_delimiter_and_space_around_it(text: str) -> None:
    rules = XattrMap.parse(text)
    assert (host(rules, b"a"), host(rules, b"b"), rules.to_client(b"b"), rules.to_client(b"a")) == (
        BAD,
        b"b",
        None,
        b"a",
    )


def test_names_are_bytes() -> None:
    rules = XattrMap.parse(":map:user.ä:user.\udcff:")
    assert host(rules, "user.äö".encode()) == b"user.\xff" + "user.äö".encode()


def test_a_refusal_names_the_attribute() -> None:
    with pytest.raises(PermissionError, match=r"extended attribute: .* \(xattrmap\): 'user.\\udcff'"):
        XattrMap.parse(":bad:all:::").to_host(b"user.\xff")


def test_a_name_of_which_nothing_is_left_is_hidden() -> None:
    assert XattrMap.parse(":map::user.virtiofs.:").to_client(b"user.virtiofs.") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no rule; without any translation leave the option out"),
        (" \n", "there is no rule;"),
        (":", "rule 1, ':', is not complete: it should be :TYPE:SCOPE:KEY:PREPEND:"),
        ("prefix", "rule 1, 'prefix', is not complete"),
        (":prefix:all:trusted.:user.vm.", "rule 1, ':prefix:all:trusted.:user.vm.', is not complete"),
        ("/prefix/all/trusted.:user.vm./", "is not complete: it should be /TYPE/SCOPE/KEY/PREPEND/"),
        (":ok:all::: :map:a:", "rule 2, ':map:a:', is not complete: it should be :map:KEY:PREPEND:"),
        (":good:all:::", "rule 1, ':good:all:::': 'good' is not a type: prefix, ok, bad, unsupported or map"),
        (":ok:all::: :ok:both:::", "rule 2, ':ok:both:::': 'both' is not a scope: client, server or all"),
        (":ok:all:a\0b::", "no name has a NUL in it"),
        (":map::user.a: :ok:all:::", "rule 1, ':map::user.a:' is a map and so has to be"),
        (":map:a:b::map::c:", "rule 1, ':map:a:b:' is a map and so has to be"),
        (":prefix:all::user.virtiofs.:", "no rule for all other names that the host lists; end with :bad:all::: to"),
        (":ok:client:::", "no rule for all other names that the host lists"),
        (":ok:server:::", "no rule for all other names that the client sends"),
        (":ok:all:user.:user.:", "no rule for all other names that the client sends"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        XattrMap.parse(text)


def test_the_two_directions_may_end_in_rules_of_their_own() -> None:
    rules = XattrMap.parse(":ok:client::: :unsupported:server:::")
    assert host(rules, b"user.a") == b"user.a"
    assert rules.to_client(b"user.a") is None


PARTS = st.sampled_from(["", "user.", "trusted.", "security.", "user.virtiofs.", "user.virtiofs.trusted.", "a"])
NAMES = st.tuples(PARTS, PARTS, st.text("abc.", max_size=3)).map("".join).filter(bool).map(str.encode)


@given(PARTS, PARTS, st.lists(NAMES, min_size=1))
def test_a_map_leads_back(key: str, prepend: str, names: list[bytes]) -> None:
    rules = XattrMap.parse(f"/map/{key}/{prepend}/")
    seen = {}
    for name in set(names):
        stored = host(rules, name)
        if isinstance(stored, bytes):
            assert rules.to_client(stored) == name
            assert stored not in seen  # no two names share a place
            seen[stored] = name
        else:
            assert prepend.encode() == b"" or name.startswith(prepend.encode())


SOME_RULES = st.lists(
    st.tuples(
        st.sampled_from(["prefix", "ok", "bad", "unsupported"]),
        st.sampled_from(["client", "server", "all"]),
        PARTS,
        PARTS,
    ),
    max_size=5,
)


@given(SOME_RULES, NAMES)
def test_rules_are_tried_one_by_one(chosen: list[tuple[str, str, str, str]], name: bytes) -> None:
    full = [*chosen, ("ok", "all", "", "")]
    rules = XattrMap.parse("".join("," + ",".join(rule) + "," for rule in full))
    kind, _, _, prepend = next(r for r in full if r[1] != "server" and name.startswith(r[2].encode()))
    sent = {"prefix": prepend.encode() + name, "ok": name, "bad": BAD, "unsupported": UNSUPPORTED}[kind]
    assert host(rules, name) == sent
    kind, _, _, prepend = next(r for r in full if r[1] != "client" and name.startswith(r[3].encode()))
    assert rules.to_client(name) == {"prefix": name[len(prepend) :] or None, "ok": name}.get(kind)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        XattrMap.parse(text)
        message = "xattrmap: "
    except ValueError as error:
        message = str(error)
    assert message.startswith("xattrmap: ")
