"""Fusewire: filesystems in Python, mounted without root."""

__version__ = "0.1.0"
