"""Translation of user and group ids between a client and the host, by rules in the words of virtiofsd.

Layer: fs. Pure: it asks nobody who has which id and changes no owner.

    guest:GUEST:HOST:COUNT         the client's ids from GUEST on are the host's from HOST on
    host:HOST:GUEST:COUNT          the host's ids from HOST on are the client's from GUEST on
    map:GUEST:HOST:COUNT           both of these
    squash-guest:GUEST:HOST:COUNT  the client's COUNT ids from GUEST on all become HOST
    squash-host:HOST:GUEST:COUNT   the host's COUNT ids from HOST on all become GUEST
    forbid-guest:GUEST:COUNT       the client's COUNT ids from GUEST on are refused

The directions know nothing of each other: `guest` alone does not map back. An id that no rule names stays the number
that it is. 4294967295 is no id (it says "leave the owner as it is", and with FUSE_ALLOW_IDMAP "not told"), no rule can
name it and it is never translated.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from itertools import pairwise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_END = 0xFFFFFFFF  # the first number that is no id
_KINDS = "guest, host, map, squash-guest, squash-host and forbid-guest"


class _Range:
    """Source ids from `start` up to and without `end`; `step` 1 for one to one, 0 for many to one."""

    __slots__ = ("end", "rule", "start", "step", "target")

    def __init__(self, rule: str, start: int, count: int, target: int, step: int) -> None:
        self.rule = rule
        self.start = start
        self.end = start + count
        self.target = target  # -1: refused
        self.step = step


def _same(number: int) -> int:
    return number


def _function(ranges: list[_Range], who: str) -> Callable[[int], int]:
    """The translation in one direction as a function, which costs a call (0.05 us) if there is nothing to translate."""
    if not ranges:
        return _same
    ranges.sort(key=lambda found: found.start)
    for one, two in pairwise(ranges):
        if two.start < one.end:
            last = min(one.end, two.end) - 1
            common = f"{two.start}" if last == two.start else f"{two.start} to {last}"
            raise ValueError(
                f"the rules {one.rule!r} and {two.rule!r} both say what becomes of the {who}'s id {common}; "
                "the last number of a rule is how many ids it is for, not the last of them"
            )
    starts = [found.start for found in ranges]

    def translate(number: int) -> int:
        place = bisect_right(starts, number) - 1
        if place < 0:
            return number
        found = ranges[place]
        if number >= found.end:
            return number
        if found.target < 0:
            raise OSError(errno.EPERM, f"id {number}: {os.strerror(errno.EPERM)} (the rule {found.rule!r})")
        return found.target + (number - found.start) * found.step

    return translate


class IdMap:
    """What becomes of ids, in both directions; see parse_translations().

    `to_host(id)` is for ids that a client sends and raises OSError (EPERM) for one that is forbidden; `to_guest(id)`
    is for ids found on the host. `identity` is True if neither changes anything.
    """

    __slots__ = ("identity", "to_guest", "to_host")

    def __init__(self, guest: list[_Range], host: list[_Range]) -> None:
        self.identity = not guest and not host
        self.to_host = _function(guest, "guest")
        self.to_guest = _function(host, "host")


def parse_translations(rules: Iterable[str]) -> IdMap:
    """Read rules of the form TYPE:SOURCE:TARGET:COUNT, or forbid-guest:SOURCE:COUNT.

    Raises ValueError that names the rule and what is wrong with it: also where two rules say something about one id.
    """
    guest: list[_Range] = []
    host: list[_Range] = []
    for rule in rules:
        kind, *fields = rule.split(":")
        if kind == "forbid-guest":
            source, count = _numbers(rule, fields, ("SOURCE", "COUNT"))
            guest.append(_Range(rule, source, count, -1, 0))
            continue
        if kind not in ("guest", "host", "map", "squash-guest", "squash-host"):
            raise ValueError(f"{rule!r} is not TYPE:SOURCE:TARGET:COUNT: the types are {_KINDS}")
        source, target, count = _numbers(rule, fields, ("SOURCE", "TARGET", "COUNT"))
        step = 0 if kind.startswith("squash") else 1
        if target + (count if step else 1) > _END:
            raise ValueError(f"the translation {rule!r} leads beyond the last id, {_END - 1}")
        if kind in ("guest", "map", "squash-guest"):
            guest.append(_Range(rule, source, count, target, step))
        if kind in ("host", "squash-host"):
            host.append(_Range(rule, source, count, target, step))
        elif kind == "map":
            host.append(_Range(rule, target, count, source, step))
    return IdMap(guest, host)


def namespace_rules(ranges: Iterable[tuple[int, ...]], own: int) -> tuple[str, ...]:
    """Give the rules for a mount of another user namespace, from its map: (id inside, id as seen from here, count).

    An id that the namespace does not have is shown as `own`, an id inside: the kernel lets nobody write to a file
    whose owner it cannot name (inode_permission, EACCES), whoever the host would let write to it.
    user_namespaces(7) describes the map. () if nothing is to be translated.
    """
    ordered = sorted((outside, inside, count) for inside, outside, count in ranges)
    rules, at = [], 0
    for outside, inside, count in ordered:
        if outside > at:
            rules.append(f"squash-host:{at}:{own}:{outside - at}")
        count = min(count, _END - max(inside, outside))
        if count > 0:
            rules.append(f"map:{inside}:{outside}:{count}")
        at = outside + count
    if at < _END:
        rules.append(f"squash-host:{at}:{own}:{_END - at}")
    return () if rules == [f"map:0:0:{_END}"] else tuple(rules)


def _numbers(rule: str, fields: list[str], names: tuple[str, ...]) -> list[int]:
    kind = rule.partition(":")[0]
    if len(fields) != len(names):
        raise ValueError(f"the translation {rule!r} is not {kind}:{':'.join(names)}")
    found = []
    for name, field in zip(names, fields, strict=True):
        if not (field.isascii() and field.isdigit() and len(field) <= 10 and int(field) <= _END):
            raise ValueError(f"the translation {rule!r}: {name} is a number from 0 to {_END}, not {field!r}")
        found.append(int(field))
    if not found[-1]:
        raise ValueError(f"the translation {rule!r} is for no id: its last number is how many there are")
    if found[0] + found[-1] > _END:
        raise ValueError(
            f"the translation {rule!r} is for ids beyond the last one, {_END - 1}: "
            f"from {found[0]} on there are {_END - found[0]}"
        )
    return found
