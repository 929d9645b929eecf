"""What the figures of a job are called, and how they are read: the same words on dashboard and report."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES = {
    "kl": "KL to dense, nats",
    "cross_entropy": "cross-entropy, nats",
    "hidden": "distance of last hidden states",
}


def objective_name(objective: str, *, folded: bool = False) -> str:
    """What the losses of a search are, for an axis; an unknown objective is its own name."""
    return OBJECTIVES.get(objective, objective) + (", once folded" if folded else "")


@dataclass(frozen=True)
class Caption:
    """A figure's title, and how to read it."""

    title: str
    text: str


BLOCK_MAP = Caption("What each half keeps", "The dense model's blocks in their order.")
SCORES = Caption(
    "Cosine score of each block",
    "The mean cosine of the hidden states that enter and leave a block: the nearer to 1, the less the block changes.",
)
SEARCH = Caption(
    "The search",
    "Every set that was evaluated, in order, of all counts on the way; the line is the least loss so far at the count "
    "that was chosen.",
)
FRONTIER = Caption(
    "Loss for every number of blocks",
    "The best set found for each count, before distillation; rings mark what this job gives up. Measured on "
    "continuations: prefill's sets given up by both halves, decode's beside the prefill half.",
)
CONTROLS = Caption(
    "The pair beside its controls",
    "The loss on continuations, before distillation: of the pair, if both halves gave up decode's set, if decode alone "
    "did, and, as a bound, if decode's set need not hold prefill's.",
)
SENSITIVITY = Caption("What each block is worth", "The loss that is added when this block alone is given up.")
SAMPLES = Caption(
    "To be read",
    "What the dense model says after a prompt, and beside it what is said as the checkpoints are served; greedily.",
)
VERDICT = Caption(
    "Verdict",
    "Up to 5% more perplexity than the dense model's is called little, more than 20% much. It is measured on text that "
    "neither search nor healing saw, by the pair as it is served.",
)
HEALING = Caption(
    "Healing",
    "The loss of each batch, and the least loss so far on held-out windows, which decides whether the trained weights "
    "are kept.",
)
KV_BYTES = Caption("Keys and values of a request", "What a request's KV cache takes, and what is sent to decode.")
AGAINST_DENSE = Caption(
    "Dense beside pruned",
    "Perplexity on validation windows that neither search nor training saw, and what the checkpoints cost.",
)
