"""Accelerators that are not there: tensors on several, computed on the CPU, which refuse to meet as on real ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
"""Of a kind that every build of torch can name and no machine has."""
CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor that says it lies on an accelerator; its numbers are `held` on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        placed = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        placed.held = held
        return placed

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # typed there as a static method
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Computing(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Making(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor:  # It would fill memory of the device itself.
            return torch.tensor(*args, **kwargs | {"device": CPU}).to(kwargs.get("device") or CPU)
        return func(*args, **kwargs)


@contextmanager
def accelerators() -> Iterator[None]:
    """Meanwhile tensors can be made on, and moved to, `FIRST` and `SECOND`."""
    with _Making(), _Computing():  # type: ignore[no-untyped-call]  # torch's own
        yield


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # As on real ones, a number of the CPU may meet anything.
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, Placed)}
    moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if len(devices) > 1 and not moves:
        raise RuntimeError(f"{func}: all tensors have to be on one device, and are on {sorted(map(str, devices))}")
    device = torch.device(kwargs.get("device") or (tensors[0].device if moves else next(iter(devices), CPU)))
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": CPU if device.type == FIRST.type else device}
    held = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Placed)}
    inner_args, inner_kwargs = tree_map_only(Placed, lambda tensor: tensor.held, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if device.type != FIRST.type:
        return out
    # What was changed in place is itself again.
    return tree_map_only(Tensor, lambda t: held[id(t)] if id(t) in held else Placed(t, device), out)
