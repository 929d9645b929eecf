"""Why a source cannot be used, as errors of the interface that are ValueErrors as well."""

from __future__ import annotations

from pdtrim.contract.errors import InvalidRequest, ModelTooLarge, PDTrimError, SourceNotAllowed, SourceUnreadable


class SourceError(PDTrimError, ValueError):
    """A source that cannot be used; `code` and `message` say why. Raised as one of those below."""


class InvalidSource(InvalidRequest, SourceError):
    """The string names no source."""


class ForbiddenSource(SourceNotAllowed, SourceError):
    """The source is not on the allow list."""


class UnreadableSource(SourceUnreadable, SourceError):
    """What the source names is not there, is closed to us, or is not what it should be."""


class TooLargeSource(ModelTooLarge, SourceError):
    """The model's files have more bytes than the operator allows."""
