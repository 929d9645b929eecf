"""What MkDocs runs as it builds: writes the pages that are made from the code."""

from __future__ import annotations

import re
from typing import Any

import reference

MARKER = re.compile(r"^<!-- generated: (\w+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
"""Between the two stands, for readers of the repository, where to find what is put in its place."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with what its markers stand for. Raises: KeyError for a marker that stands for nothing."""
    return MARKER.sub(lambda marker: reference.PARTS[marker[1]](), markdown)
