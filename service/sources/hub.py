"""The Hugging Face hub: a model repository at one commit, and the hub's errors in our words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from service.sources.errors import UnreadableSource
from service.sources.files import Declared, Digest
from service.stopping import Check, go_on
from service.storage import StoreUnavailable

ANSWER_SECONDS = 10.0


class HubFiles:
    """The files of a model repository, at the commit that `revision` names now."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self._repo = repo
        with hub_failures(f"hf://{repo}"):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS)
        if info.sha is None or info.siblings is None:
            raise StoreUnavailable(f"{constants.ENDPOINT} told neither commit nor files of hf://{repo}; try again")
        self.commit = info.sha
        self._declared = {entry.rfilename: _declared(entry, self) for entry in info.siblings}

    def __str__(self) -> str:
        return f"hf://{self._repo} at {self.commit}"

    def names(self) -> list[str]:
        return sorted(self._declared)

    def size(self, name: str) -> int:
        return self._declared[name].size

    def declared(self, name: str) -> Declared:
        return self._declared[name]

    def read(self, name: str, limit: int) -> bytes:
        return self.read_range(name, 0, min(limit, self.size(name)))

    def read_range(self, name: str, start: int, stop: int, check: Check = go_on) -> bytes:
        # Not the library's own downloads: those of a killed process begin again.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        whole = (start, stop) == (0, self.size(name))
        if not whole:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        url = hf_hub_url(self._repo, name, revision=self.commit)
        data = bytearray()
        with (
            hub_failures(str(self)),
            # No retries on exceptions: it would go round again in the middle of this block.
            http_stream_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=2,
                retry_on_exceptions=(),
            ) as response,
        ):
            hf_raise_for_status(response)
            if not whole and response.status_code != 206:
                raise StoreUnavailable(f"{constants.ENDPOINT} did not give {name} of {self} in parts; try again")
            for chunk in response.iter_bytes():
                check()
                data += chunk
                if len(data) > stop - start:
                    break
        if len(data) != stop - start:
            raise StoreUnavailable(f"{name} of {self} arrived with {start + len(data)} bytes, not {stop}; try again")
        return bytes(data)


def _declared(entry: RepoSibling, repository: HubFiles) -> Declared:
    if entry.size is None:
        raise StoreUnavailable(f"{constants.ENDPOINT} did not tell the size of {entry.rfilename} of {repository}")
    if entry.lfs is not None:
        return Declared(entry.size, entry.lfs.sha256, Digest(hashlib.sha256, entry.lfs.sha256))
    if entry.blob_id is not None:
        return Declared(entry.size, entry.blob_id, Digest(partial(_git_blob, entry.size), entry.blob_id))
    return Declared(entry.size, repository.commit)


def _git_blob(size: int) -> hashlib._Hash:
    """The hash by which git names a file of `size` bytes."""
    return hashlib.sha1(b"blob %d\x00" % size, usedforsecurity=False)


@contextmanager
def hub_failures(what: str) -> Iterator[None]:
    """The hub's errors as ours: UnreadableSource for what is the request's fault, else StoreUnavailable."""
    try:
        yield
    except GatedRepoError as error:
        raise UnreadableSource(
            f"{what} is gated: accept its licence on the hub, and give the service that account's token in HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnreadableSource(
            f"{what} does not exist on {constants.ENDPOINT}, or is private: check the name, or give the service a "
            "token that may read it in HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UnreadableSource(f"{what} has no such revision: give a branch, a tag or a commit of it.") from error
    except DisabledRepoError as error:
        raise UnreadableSource(f"{what} has been disabled on the hub.") from error
    except LocalEntryNotFoundError as error:
        # The hub's word for "not cached, and there is no connection".
        raise _unreachable(what, error) from error
    except EntryNotFoundError as error:
        raise UnreadableSource(f"{what} lacks a file: {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UnreadableSource(f"{what} is closed to the service: check the token in HF_TOKEN.") from error
        raise _unreachable(what, error) from error
    except (httpx2.HTTPError, FileMetadataError, RevisionResolutionError, XetDownloadError, ConnectionError) as error:
        raise _unreachable(what, error) from error


def _unreachable(what: str, error: Exception) -> StoreUnavailable:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return StoreUnavailable(
        f"{constants.ENDPOINT} did not give {what}: {reason}; check that this machine reaches it, or set HF_ENDPOINT"
    )
