"""One model built at a time: transformers and accelerate patch torch for every thread of a process while they build.

What is built is what a configuration says, and no more than the checkpoint's tensors could fill. Of what cannot be
built libraries raise whatever they come upon first; here that is one error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import logging as transformers_logging

_BUILDING = RLock()
WAIT_SECONDS = 0.5


MAX_SAID = 300
PARTS_A_TENSOR, MORE_PARTS = 20, 1000
"""Modules and parameters: of the supported architectures none has more than three for each stored tensor."""


FAULTS = (
    *(TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(NotImplementedError, ImportError, StrictDataclassError),
)
"""What libraries raise of values that they did not expect; a full memory, disk or device is something else."""


class ImpossibleModel(ValueError):
    """A configuration describes no model that can be built, or run; the message has the library's own words."""


class NotThatLarge(ImpossibleModel):
    """A configuration describes a larger model than the one whose tensors lie beside it."""


@contextmanager
def building(check: Callable[[], None] = lambda: None, *, tensors: int) -> Iterator[None]:
    """While this lasts, no other thread of the process that asks for the same builds a model.

    `check`, which may raise, is called while another thread is waited for, before each part of a model that is built,
    and before each weight that transformers loads: where it would move a progress bar.
    Raises: NotThatLarge for a model that its checkpoint of so many `tensors` could not fill; ImpossibleModel for one
    that cannot be built; what `check` raises, which is none of FAULTS.
    """
    while not _BUILDING.acquire(timeout=WAIT_SECONDS):
        check()

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(_Asked(args[0], check), *args[1:], **kwargs) if args else factory(*args, **kwargs)

    builder, parts, most = get_ident(), 0, PARTS_A_TENSOR * tensors + MORE_PARTS

    def part(module: Any, name: str, what: Any) -> None:
        nonlocal parts
        if get_ident() != builder:
            return
        check()
        parts += 1
        if parts > most:
            raise NotThatLarge(
                f"config.json describes a model of more than {most} parts, but there are {tensors} tensors"
            )

    # Hooks of the whole process, as the lock is the whole process's.
    hooks = (register_module_module_registration_hook(part), register_module_parameter_registration_hook(part))
    outer = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    except ImpossibleModel:
        raise
    except FAULTS as error:
        raise ImpossibleModel(f"config.json describes no model that can be built: {said(error)}") from error
    finally:
        transformers_logging.set_tqdm_hook(outer)
        for hook in hooks:
            hook.remove()
        _BUILDING.release()


def said(error: Exception) -> str:
    """A library's error in one line of bounded length."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= MAX_SAID else f"{text[:MAX_SAID]}…"


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
