"""The content of the floor benchmark's one file, as in pattern.h: 32-bit words that repeat every PATTERN_BYTES."""

from __future__ import annotations

from array import array

PATTERN_BYTES = 1 << 20


def doubled_pattern() -> bytes:
    """Give the pattern twice in a row, so that a read of up to PATTERN_BYTES at any offset is one slice."""
    words = array("I", ((i * 2654435761) & 0xFFFFFFFF for i in range(PATTERN_BYTES // 4)))
    return words.tobytes() * 2
