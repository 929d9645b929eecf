"""The Python client of the HTTP interface: `Client` blocks, `AsyncClient` is for asyncio."""

from service.client.awaiting import AsyncClient, AsyncClientJob
from service.client.blocking import Client, ClientJob
from service.client.errors import (
    AnswerLost,
    ClientError,
    CorruptDownload,
    ServiceError,
    ServiceUnreachable,
    UnexpectedAnswer,
    UnsafeName,
)

__all__ = [
    "AnswerLost",
    "AsyncClient",
    "AsyncClientJob",
    "Client",
    "ClientError",
    "ClientJob",
    "CorruptDownload",
    "ServiceError",
    "ServiceUnreachable",
    "UnexpectedAnswer",
    "UnsafeName",
]
