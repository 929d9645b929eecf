"""Where models and texts come from: the package itself, folders, S3 and the Hugging Face hub."""

from __future__ import annotations

from service.sources.errors import ForbiddenSource, InvalidSource, SourceError, TooLargeSource, UnreadableSource
from service.sources.models import (
    ModelDescription,
    check_links,
    describe_model,
    fetch_model,
    hold_model,
    reference_model,
    resolve_revision,
)
from service.sources.names import (
    LocalPath,
    ModelSource,
    TextSource,
    check_allowed,
    parse_model_source,
    parse_text_source,
)
from service.sources.rows import Conversation, Exchange, Row, Text, check_answered
from service.sources.texts import Chosen, check_text, fetch_rows

__all__ = [
    "Chosen",
    "Conversation",
    "Exchange",
    "ForbiddenSource",
    "InvalidSource",
    "LocalPath",
    "ModelDescription",
    "ModelSource",
    "Row",
    "SourceError",
    "Text",
    "TextSource",
    "TooLargeSource",
    "UnreadableSource",
    "check_allowed",
    "check_answered",
    "check_links",
    "check_text",
    "describe_model",
    "fetch_model",
    "fetch_rows",
    "hold_model",
    "parse_model_source",
    "parse_text_source",
    "reference_model",
    "resolve_revision",
]
