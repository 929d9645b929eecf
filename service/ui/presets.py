"""Where the submit form may begin: named settings for what people want of a job, each of them values of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Settings by the paths of their fields; what other presets set is as by default. A ticked box is `on`."""

    name: str
    title: str
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)


PRESETS = (
    Preset("balanced", "Balanced", "The defaults: fit for most models that are to be served."),
    Preset(
        "prefill",
        "Lighter prefill",
        "A quarter of a prompt's operations goes, mostly blocks that are kept for their keys and values alone, beside "
        "which decode may stay as deep as it will. vLLM saves the time with pdtrim-vllm.",
        {"prefill.flops": "0.75"},
    ),
    Preset(
        "quick",
        "Quick look",
        "Greedy search, a quarter of the windows, an eighth of the healing: roughly what to expect, soon.",
        {
            "calibration.windows": "16",
            "search.algorithm": "greedy",
            "distillation.heal_tokens": "16384",
            "evaluation.windows": "8",
        },
    ),
    Preset(
        "thorough",
        "Thorough",
        "Twice the windows, eight times the healing, four times the validation: for what will be served.",
        {"calibration.windows": "128", "distillation.heal_tokens": "1048576", "evaluation.windows": "128"},
    ),
    Preset(
        "frugal",
        "Little memory",
        "Healing by low-rank adapters, in small parts, with blocks computed again: for models that hardly fit.",
        {
            "distillation.trainable": "lora",
            "distillation.gradient_accumulation": "8",
            "distillation.gradient_checkpointing": "on",
        },
    ),
    Preset(
        "unhealed",
        "No healing",
        "The pruned weights as they are: fast, and what healing is to be held against.",
        {"distillation.enabled": ""},
    ),
)
GOVERNED = frozenset(path for preset in PRESETS for path in preset.fields)
"""The fields that a preset sets, or puts back."""


def preset_of(typed: Mapping[str, str], defaults: Mapping[str, str]) -> Preset | None:
    """The preset whose settings a form has, if it has those of one."""
    return next(
        (one for one in PRESETS if all(typed.get(p, "") == one.fields.get(p, defaults[p]) for p in GOVERNED)), None
    )


def with_preset(typed: Mapping[str, str], name: str, defaults: Mapping[str, str]) -> dict[str, str]:
    """What was typed, with the settings of a preset; as it was, where there is none of that name."""
    found = next((one for one in PRESETS if one.name == name), None)
    if found is None:
        return dict(typed)
    return {**typed, **{path: found.fields.get(path, defaults[path]) for path in GOVERNED}}
