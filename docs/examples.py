"""Docstrings say ``Example:``; the site's reader of docstrings knows the section as ``Examples:``."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which its lines are code, not Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
