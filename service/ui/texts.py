"""Parts of a specification as people write them: YAML, of which JSON is a kind."""

from __future__ import annotations

import json
from typing import Any

import yaml

from pdtrim.contract.yaml_text import plain_data


class _Plain(yaml.SafeDumper):
    """Writes what is there twice, twice: anchors are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_text(content: Any) -> str:
    """Plain data as YAML that is read back as the same; as JSON where YAML as we read it would be something else."""
    text = yaml.dump(content, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
    try:
        same = plain_data(text) == content
    except ValueError:
        same = False
    return text if same else json.dumps(content, indent=2, ensure_ascii=False)


def from_text(text: str) -> Any:
    """What YAML or JSON stands for. Raises: ValueError, which says where it is wrong; RecursionError."""
    if text.lstrip().startswith("{"):
        try:
            # JSON may be indented by tabs, and be longer than we read YAML.
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    return plain_data(text)
