"""The loss of what prefill gives up and leaves keys and values of, beside a decode half that is decided.

Prompt and continuation go through the blocks together: two prefill halves that begin alike have the same hidden states
of the prompt, the same keys and values, and so the same hidden states of the continuation, up to the first block at
which they differ. One walk carries both for each distinct way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.pruning.model.blocks import BlockStack, capture_calls, capture_continuation_calls
from workers.pruning.model.pair import FirstToken, check_prompt
from workers.pruning.model.units import Units, Way, check_nested, way_through
from workers.pruning.search.engine import (
    ChunkedEngine,
    Objective,
    Walked,
    dense_hidden,
    mean_losses,
    prefill_step,
    take_step,
    unheard,
)


class PrefillEngine(ChunkedEngine):
    """Losses of what prefill gives up, on continuations by a decode half that gives up `decode`.

    The loss is that of `PairEngine` for the same two sets.
    """

    def __init__(
        self,
        stack: BlockStack,
        windows: Tensor,
        objective: Objective,
        *,
        decode: Units,
        prompt_tokens: int,
        first_token: FirstToken,
        chunk_windows: int,
    ) -> None:
        """Raises: as `PairEngine`."""
        self._handed = check_prompt(prompt_tokens, first_token, windows.shape[1])
        super().__init__(stack, windows, objective, chunk_windows, walked_tokens=windows.shape[1] - 1, anchor_bytes=0)
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        self._in_prompt = capture_calls(stack, windows[:, : self._handed])
        self._continued = capture_continuation_calls(stack, windows[:, :-1], self._handed)
        self._dense: dict[range, Tensor] = {}

    def window_losses(
        self,
        candidates: Sequence[Units],
        windows: range,
        objective: Objective | None = None,
        *,
        walked: Walked = unheard,
    ) -> dict[Units, list[float]]:
        """Mean loss a continued token of each candidate on each of `windows`.

        Raises: NonFiniteLoss; OutOfMemoryError; ValueError when decode keeps an attention that a candidate leaves
        nothing for.
        """
        for candidate in candidates:
            check_nested(candidate, self._decode)
        return super().window_losses(candidates, windows, objective, walked=walked)

    def _shrink(self, chunk_windows: int) -> None:
        super()._shrink(chunk_windows)
        self._dense.clear()

    def _chunk_losses(
        self, candidates: Sequence[Units], chunk: range, objective: Objective
    ) -> dict[Units, list[float]]:
        ids, first = self._ids[chunk.start : chunk.stop], self._prompt_tokens - 1
        if chunk not in self._dense and objective != "cross_entropy":
            dense, forwards = dense_hidden(self._stack, ids)
            self._dense[chunk] = dense[:, first:]
            self.block_forwards += forwards
        prompt = self._stack.embed(ids[:, : self._handed])
        continued = self._stack.embed(ids[:, self._handed : -1], start=self._handed)
        last = self._walk_both(candidates, prompt, continued)
        whole = {
            candidate: torch.cat([in_prompt[:, first:].to(after.device), after], dim=1)
            for candidate, (in_prompt, after) in last.items()
        }
        return mean_losses(self._stack, objective, whole, self._dense.get(chunk), ids[:, self._prompt_tokens :])

    def _walk_both(
        self, candidates: Sequence[Units], prompt: Tensor, continued: Tensor
    ) -> dict[Units, tuple[Tensor, Tensor]]:
        """h_0 of prompt and continuation (batch, time, hidden) → their h_L for every candidate.

        A block-forward is counted for each way that runs a block, since the two together are one window long.
        """
        ways = {candidate: way_through(candidate, self.num_blocks) for candidate in candidates}
        in_decode = way_through(self._decode, self.num_blocks)
        states: dict[Way, tuple[Tensor, Tensor]] = {(): (prompt, continued)}
        for block in range(self.num_blocks):
            following: dict[Way, tuple[Tensor, Tensor]] = {}
            for way in {way[: block + 1]: None for way in ways.values()}:
                in_prompt, after = states[way[:block]]
                if (way[block], in_decode[block]) == ("kv_only", "skip"):
                    following[way] = in_prompt, after
                    continue
                in_prompt, cache = prefill_step(self._stack, self._in_prompt, block, way[block], in_prompt)
                after = take_step(self._stack, self._continued, block, in_decode[block], after, cache)
                following[way] = in_prompt, after
                self.block_forwards += (way[block], in_decode[block]) != ("skip", "skip")
            states = following
            self._passed(block)
        return {candidate: states[way] for candidate, way in ways.items()}
