"""The Python client of the HTTP interface: `Client` blocks, `AsyncClient` is for asyncio."""

from pdtrim.client.asynchronous import AsyncClient, AsyncClientJob
from pdtrim.client.blocking import Client, ClientJob
from pdtrim.client.errors import (
    AnswerLost,
    ClientError,
    CorruptDownload,
    JobFailed,
    NothingToDownload,
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
    "JobFailed",
    "NothingToDownload",
    "ServiceError",
    "ServiceUnreachable",
    "UnexpectedAnswer",
    "UnsafeName",
]
