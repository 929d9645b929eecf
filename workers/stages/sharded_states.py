"""States of healing on several devices in the store: two folders, filled in turn, and which of them counts."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor

from pdtrim.contract.results import Half
from workers.pruning.repair.sharded_state import load_whole
from workers.stages.context import StageContext
from workers.stages.healing_folder import HealingFolder


class StoredState(BaseModel):
    """What the store has of a half's newest state."""

    step: int
    turn: int
    """0 or 1: which folder."""
    files: list[str]


def stored_state(context: StageContext, half: Half) -> StoredState | None:
    """What an earlier attempt left. Raises: StoreUnavailable."""
    found = context.load_state(_name(half))
    return None if found is None else StoredState.model_validate_json(found)


def store_state(
    context: StageContext, folder: HealingFolder, half: Half, step: int, before: StoredState | None
) -> StoredState:
    """Upload a state that all ranks have written; the one `before` counts until all of it is there.

    Raises: StoreUnavailable.
    """
    source, turn = folder.state(half, step), 0 if before is None else 1 - before.turn
    state = StoredState(step=step, turn=turn, files=sorted(path.name for path in source.iterdir()))
    for name in state.files:
        context.store.put_file(_key(context, half, state, name), source / name)
    context.save_state(_name(half), state.model_dump_json().encode())
    return state


def fetch_state(context: StageContext, half: Half, state: StoredState, target: Path) -> None:
    """Download it into the new folder `target`. Raises: StoreUnavailable."""
    target.mkdir(parents=True)
    for name in state.files:
        context.store.download(_key(context, half, state, name), target / name)


def whole_state(context: StageContext, half: Half, state: StoredState) -> dict[str, Tensor]:
    """It, for healing on one device. Raises: StoreUnavailable."""
    target = context.workdir / f"kept-{half}"
    fetch_state(context, half, state, target)
    found = load_whole(target)
    shutil.rmtree(target)
    return found


def _name(half: Half) -> str:
    return f"heal-{half}.json"


def _key(context: StageContext, half: Half, state: StoredState, name: str) -> str:
    return f"{context.state_prefix}/heal-{half}/{state.turn}/{name}"
