"""One model built at a time: transformers and accelerate patch torch for every thread of a process while they build."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

from transformers.utils import logging as transformers_logging

_BUILDING = RLock()
WAIT_SECONDS = 0.5


@contextmanager
def building(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While this lasts, no other thread of the process that asks for the same builds a model.

    `check`, which may raise, is called while another thread is waited for, and then before each weight that
    transformers loads: where it would move a progress bar.
    """
    while not _BUILDING.acquire(timeout=WAIT_SECONDS):
        check()

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(_Asked(args[0], check), *args[1:], **kwargs) if args else factory(*args, **kwargs)

    outer = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(outer)
        _BUILDING.release()


@dataclass(frozen=True)
class _Asked:
    """A collection that calls `check` before it gives an item."""

    items: Collection[Any]
    check: Callable[[], None]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.check()
            yield item
