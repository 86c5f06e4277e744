"""`import rustune.drop_in` lets the cells of an Unsloth notebook run unchanged.

It always answers for `unsloth` and `trl`. Where torch, transformers or peft are installed, `sys.modules` gets a proxy
that hands everything on to them except our names (`names.py`), and nothing of theirs is changed; where they are absent,
a stand-in takes the name and says what it is. `uninstall()` puts everything back.
"""

from __future__ import annotations

import sys

from rustune.drop_in import aliases

__all__ = ["install", "uninstall"]


def install() -> None:
    """Answers for the names; importing this module does it. A second call changes nothing."""
    aliases.install()


def uninstall() -> None:
    """Puts `sys.modules` back as it was; objects that were imported stay usable. A second call changes nothing.

    `import rustune.drop_in` installs again afterwards.
    """
    aliases.uninstall()
    sys.modules.pop(__name__, None)
    parent = sys.modules.get("rustune")
    if parent is not None and getattr(parent, "drop_in", None) is not None:
        del parent.drop_in


install()
