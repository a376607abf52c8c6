"""How Sphinx makes the API reference: `./dev docs` builds it, with each warning an error.

The reference is what the docstrings say. Guides are the other pages of docs/.
"""

import re

import fusewire

project = "Fusewire"
version = release = fusewire.__version__
extensions = ["sphinx.ext.autodoc"]

# Docstrings are plain text: `name` is code, not a role to look up.
default_role = "code"
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
# Signatures show these names, and the pages say what they stand for: Answer[T] says more than the union that it is.
autodoc_type_aliases = {
    "Answer": "fusewire.ops.Answer",
    "Eventual": "fusewire.ops.Eventual",
    "Attr": "fusewire.Attr",
    "Buffer": "fusewire.Buffer",
    "Filesystem": "fusewire.mounts.Filesystem",
    "Path": "fusewire.mounts.Path",
    "Log": "fusewire.session.Log",
}
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    # Python's own: its inventory would have to be fetched, and the build works without a network.
    ("py:class", r"(collections\.abc|ctypes|_ctypes|logging)\..*|os\.PathLike"),
    # The variable of `Answer[T]`.
    ("py:class", "T"),
    # Whoever tests a filesystem passes these on, and looks into neither.
    ("py:class", r"fusewire\.session\.Session|fusewire\.adapters\.FileReply"),
]

html_theme = "alabaster"
html_theme_options = {"page_width": "72em", "description": "Filesystems in Python, mounted without root"}
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False


def is_left_out(app, what, name, member, skip, options):
    """Leave out the fields of named tuples, which the signature has; None leaves the decision to autodoc."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def with_plain_aliases(app, what, name, member, options, signature, returns):
    """Give a signature its aliases by name where autodoc shows how it keeps them (in Sphinx 9.0, within a tuple)."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text) for text in (signature, returns))


def setup(app):
    """Connect the two functions above; Sphinx calls this."""
    app.connect("autodoc-skip-member", is_left_out)
    app.connect("autodoc-process-signature", with_plain_aliases)
    return {"parallel_read_safe": True}
