"""The Hugging Face hub: a model repository at one commit, and the hub's errors in our words."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
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

from service.sources.errors import UnreadableSource
from service.storage import StoreUnavailable

ANSWER_SECONDS = 15.0
DOWNLOADS_AT_ONCE = 4


class HubFiles:
    """The files of a model repository, at the commit that `revision` names now."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self._repo = repo
        with hub_failures(f"hf://{repo}"):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS)
        if info.sha is None or info.siblings is None:
            raise StoreUnavailable(f"{constants.ENDPOINT} told neither commit nor files of hf://{repo}; try again")
        self.commit = info.sha
        self.sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings}

    def __str__(self) -> str:
        return f"hf://{self._repo} at {self.commit}"

    def names(self) -> list[str]:
        return sorted(self.sizes)

    def size(self, name: str) -> int:
        return self.sizes[name]

    def read(self, name: str) -> bytes:
        with TemporaryDirectory() as folder, hub_failures(str(self)):
            return Path(hf_hub_download(self._repo, name, revision=self.commit, local_dir=folder)).read_bytes()

    def fetch(self, names: Sequence[str], target: Path) -> None:
        """Download files into `target`, going on where an earlier call stopped."""
        with hub_failures(str(self)):
            snapshot_download(
                self._repo,
                revision=self.commit,
                local_dir=target,
                allow_patterns=[glob.escape(name) for name in names],
                max_workers=DOWNLOADS_AT_ONCE,
            )
        # Without an answer from the hub, the library makes do with what an earlier call left in the folder.
        for name in names:
            size = (target / name).stat().st_size if (target / name).is_file() else 0
            if size != self.sizes[name]:
                raise StoreUnavailable(f"{name} of {self} arrived with {size} bytes, not {self.sizes[name]}; try again")


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
