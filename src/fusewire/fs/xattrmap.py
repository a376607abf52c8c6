"""Other names for extended attributes on the host than at the client, by rules in the words of virtiofsd.

Layer: fs. Pure: names in, names out; it never sees a file or a value.

A rule is TYPE, SCOPE, KEY and PREPEND, with one character (the rule's first) before, between and after them, such as
`:prefix:all:trusted.:user.virtiofs.:`. White space may stand between rules. The first rule that matches decides:

    scope   client  names that the client sends, if they begin with KEY
            server  names that the host lists, if they begin with PREPEND
            all     both
    type    prefix       PREPEND is put before the client's name; it is taken off the host's
            ok           the name goes through unchanged
            bad          the client gets EPERM; the host's name is hidden
            unsupported  the client gets EOPNOTSUPP; the host's name is hidden

`:map:KEY:PREPEND:` stands for the usual set of them and comes last. Some rule has to match every name, in both
directions: a name for which there is no rule would be a hole that nobody has thought of.
"""

from __future__ import annotations

import errno
import os

_TYPES = ("prefix", "ok", "bad", "unsupported")
_SCOPES = ("client", "server", "all")

# What is put before a name, or why there is none for it.
_Rule = tuple[bytes, bytes | int]


class XattrMap:
    """The rules as parse() has read them."""

    __slots__ = ("_client", "_server")

    def __init__(self, client: list[_Rule], server: list[_Rule]) -> None:
        self._client = client  # (beginning, what to put before it, or the errno)
        self._server = server  # (beginning, what is left of it, or the errno: hidden)

    @classmethod
    def parse(cls, text: str) -> XattrMap:
        """Read the rules. Raises ValueError that names the rule by its place and text, and what is wrong with it."""
        client: list[_Rule] = []
        server: list[_Rule] = []
        number = 0
        rest = text.strip()
        has_map = ""
        while rest:
            number += 1
            kind, scope, key, prepend, length = _next_rule(rest, number)
            where = f"rule {number}, {rest[:length]!r}"
            if has_map:
                raise ValueError(
                    f"xattrmap: {has_map} is a map and so has to be the only one of its kind, and the last"
                )
            if kind == "map":
                has_map = where
                expanded = _expand(key, prepend)
            else:
                expanded = [(kind, scope, key, prepend)]
            for kind, scope, key, prepend in expanded:
                refusal = {"bad": errno.EPERM, "unsupported": errno.EOPNOTSUPP}.get(kind)
                added = prepend if kind == "prefix" else b""
                if scope != "server":
                    client.append((key, added if refusal is None else refusal))
                if scope != "client":
                    left = b"" if kind == "prefix" else prepend
                    server.append((prepend, left if refusal is None else refusal))
            rest = rest[length:].lstrip()
        if not number:
            raise ValueError("xattrmap: there is no rule; without any translation leave the option out")
        for scope, rules in (("client", client), ("server", server)):
            if not any(not beginning for beginning, _ in rules):
                origin = "that the client sends" if scope == "client" else "that the host lists"
                raise ValueError(
                    f"xattrmap: there is no rule for all other names {origin}; "
                    "end with :bad:all::: to refuse and hide them, or :ok:all::: to let them through"
                )
        return cls(client, server)

    def to_host(self, name: bytes) -> bytes:
        """Give the host's name for one that the client asks for, sets or removes.

        Raises OSError: EPERM or EOPNOTSUPP where the rules say so.
        """
        for beginning, action in self._client:
            if name.startswith(beginning):
                if isinstance(action, int):
                    raise OSError(action, f"extended attribute: {os.strerror(action)} (xattrmap)", os.fsdecode(name))
                return action + name
        raise OSError(errno.EPERM, "extended attribute: no rule matches (xattrmap)", os.fsdecode(name))

    def to_client(self, name: bytes) -> bytes | None:
        """Give the client's name for one that the host lists, or None if it is hidden.

        So is a name of which nothing would be left: no attribute has an empty name.
        """
        for beginning, action in self._server:
            if name.startswith(beginning):
                return None if isinstance(action, int) else action + name[len(beginning) :] or None
        return None


def _next_rule(text: str, number: int) -> tuple[str, str, bytes, bytes, int]:
    """Split the first rule off: type, scope, key, prepend and how many characters it is long."""
    delimiter = text[0]
    fields = text[1:].split(delimiter, 4)
    kind = fields[0]
    wanted = 3 if kind == "map" else 4
    if len(fields) <= wanted:
        # What is left when the rules are read wrongly starts in the middle of one.
        form = "map:KEY:PREPEND" if kind == "map" else "TYPE:SCOPE:KEY:PREPEND"
        shape = delimiter + form.replace(":", delimiter) + delimiter
        raise ValueError(f"xattrmap: rule {number}, {text!r}, is not complete: it should be {shape}")
    fields = fields[:wanted]
    length = 1 + sum(len(field) + 1 for field in fields)
    where = f"xattrmap: rule {number}, {text[:length]!r}"
    if kind not in (*_TYPES, "map"):
        raise ValueError(f"{where}: {kind!r} is not a type: prefix, ok, bad, unsupported or map")
    scope = "all" if kind == "map" else fields[1]
    if scope not in _SCOPES:
        raise ValueError(f"{where}: {scope!r} is not a scope: client, server or all")
    if "\0" in text[:length]:
        raise ValueError(f"{where}: no name has a NUL in it")
    return kind, scope, os.fsencode(fields[-2]), os.fsencode(fields[-1]), length


def _expand(key: bytes, prepend: bytes) -> list[tuple[str, str, bytes, bytes]]:
    """Give the rules that a map rule stands for."""
    if not key:
        return [("prefix", "all", b"", prepend), ("bad", "all", b"", b"")]
    return [
        ("prefix", "all", key, prepend),
        ("bad", "server", b"", key),  # the host's own of these names are not the client's
        ("bad", "client", prepend, b""),  # nobody gets at the stored ones by their stored names
        ("ok", "all", b"", b""),
    ]
