"""Griffe's extension: doctests in docstrings are shown as code. They stand there without a heading of their own."""

import re
from typing import Any

from griffe import Extension, Object

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)


class Doctests(Extension):
    """Put fences around doctests."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called with every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
