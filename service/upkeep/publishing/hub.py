"""A job's checkpoints as repositories on the Hugging Face hub.

A file that the repository has already is not sent again, and where nothing differs no commit is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import disable_progress_bars

from pdtrim.contract.spec import PushSpec
from service.db.tables import ArtifactRow
from service.settings import Settings
from service.sources.hub import ANSWER_SECONDS
from service.upkeep.publishing.record import Record

WEIGHTS = (".safetensors", ".safetensors.index.json")


def publish(record: Record, push: PushSpec, settings: Settings) -> list[str]:
    """Push every checkpoint; returns the repositories' addresses. Raises: what the hub's library raises."""
    disable_progress_bars()
    token = settings.hub_push_token
    api = HfApi(token=None if token is None else token.get_secret_value(), library_name="pdtrim")
    checkpoints = record.checkpoints
    urls = []
    for role, rows in checkpoints.items():
        repo = push.repo if len(checkpoints) == 1 else f"{push.repo}-{role}"
        url = api.create_repo(repo, private=push.private, exist_ok=True)
        _push(api, repo, role, rows, record)
        urls.append(str(url))
    return urls


def _push(api: HfApi, repo: str, role: str, rows: Sequence[ArtifactRow], record: Record) -> None:
    info = api.model_info(repo, files_metadata=True, timeout=ANSWER_SECONDS)
    there = {entry.rfilename: entry for entry in info.siblings or []}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    names = {row.name.removeprefix(f"{role}/"): row for row in rows}
    for name, row in names.items():
        entry = there.get(name)
        if entry is not None and entry.lfs is not None and entry.lfs.sha256 == row.sha256:
            continue
        with record.file(row) as path:
            # Weights go one by one, so that the disk need not hold them all; the rest goes with the commit.
            if name.endswith(".safetensors"):
                added = CommitOperationAdd(name, path)
                api.preupload_lfs_files(repo, [added])
            else:
                added = CommitOperationAdd(name, path.read_bytes())
        operations.append(added)
    # Shards of what was pushed there before would be taken for this model's.
    stale = [name for name in there if name.endswith(WEIGHTS) and name not in names]
    operations += [CommitOperationDelete(name) for name in stale]
    if operations:
        # The library leaves out what is the same, and makes no commit of nothing.
        api.create_commit(repo, operations, commit_message=f"The {role} checkpoint of {record.job.id}")
