"""Filesystems. Each is an `Operations`; none knows which transport serves it."""
