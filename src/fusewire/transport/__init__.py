"""Transports: pumps around `Session.handle`. They never import a filesystem."""
