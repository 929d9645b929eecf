"""A checkpoint's model card, README.md with metadata as the Hugging Face hub reads it.

Export writes it with what is known by then. Evaluation writes it again with the figures of the report, as an artifact
of the same name, which takes the other's place wherever checkpoints are downloaded or published.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from pdtrim.display.tables import PARTS, Table
from workers.pruning.serving.pair_server import first_token_of

INHERITED = ("license", "license_name", "license_link", "language")
"""What a pruned model has from its source."""
MAX_CARD_BYTES = 1 << 20
MAX_VALUE = 512
FIRST_TOKEN = {
    "decode": "Decode runs the prompt's last token itself, and so says the first generated one.",
    "prefill": "Prefill says the first generated token.",
}
"""How the pair is served, by `serving.first_token` of its pdtrim.json."""
HUB = "hf://"
log = logging.getLogger(__name__)


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """What a source's own card says of its licence and languages; nothing where it has none that can be read."""
    path = folder / "README.md"
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}
    try:
        found = metadata_load(path)
    except (ValueError, yaml.YAMLError) as error:
        log.warning("the model's card cannot be read; its licence is not passed on: %s", error)
        return {}
    given = found if isinstance(found, dict) else {}
    return {key: given[key] for key in INHERITED if _is_plain(given.get(key))}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and 0 < len(item) <= MAX_VALUE for item in items)


def model_card(pdtrim: Mapping[str, Any], inherited: Mapping[str, Any], measured: Sequence[Table] = ()) -> str:
    """The card of the checkpoint with this `pdtrim.json`, and what was `measured` of it."""
    role, source = pdtrim["role"], pdtrim["source"]["uri"]
    kept, blocks = pdtrim["kept_blocks"], pdtrim["num_source_blocks"]
    base = source.removeprefix(HUB) if source.startswith(HUB) else None
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if pdtrim.get("vision_language") else "text-generation",
        tags=["pruned", "pdtrim", role],
        **inherited,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {base or source}, {role} checkpoint",
        f"{len(kept)} of {blocks} transformer blocks of {_link(base, source)}, chosen and repaired with the PDTrim\n"
        "method (Zhang et al., ACL 2026, arXiv 2509.04467).",
        _given_up(pdtrim),
        f"Load it with `{_loader(pdtrim)}.from_pretrained`. `pdtrim.json` lists the kept blocks and, for a "
        "prefill/decode\npair, `kv_layer_map`: layer k of the decode checkpoint continues the KV cache of layer "
        f"`kv_layer_map[k]` of the prefill\ncheckpoint. {FIRST_TOKEN[first_token_of(pdtrim)]}",
    ]
    if pdtrim.get("dead_units"):
        parts.append(
            "What blocks give up is zeros in the weights, so any runtime computes the pruned model. vLLM with "
            "`pdtrim-vllm`\nleaves it out (`dead_units` of `pdtrim.json`); others take the dense model's time for it."
        )
    if opening := pdtrim.get("opening"):
        tokens = " ".join(f"`{token}`" for token in opening)
        parts.append(
            f"Its tokenizer begins a text with {tokens}, and so did every window that it was chosen, repaired and "
            "measured\non: begin prompts with it."
        )
    parts += pdtrim.get("notes", [])
    rule = pdtrim.get("kv_tokens")
    if rule is not None and rule["layers"]:
        parts.append(
            f"Of each prompt, layers {', '.join(map(str, sorted(rule['layers'])))} of the decode checkpoint are sent "
            f"the keys and values\nof the first {rule['first']} and the last {rule['last']} tokens only (`kv_tokens`)."
        )
    parts += [f"## {table.title}\n\n{_markdown(table)}" for table in measured]
    return "\n\n".join(parts) + "\n"


def _loader(pdtrim: Mapping[str, Any]) -> str:
    return "AutoModelForImageTextToText" if pdtrim.get("vision_language") else "AutoModelForCausalLM"


def _link(base: str | None, source: str) -> str:
    return f"`{source}`" if base is None else f"[{base}](https://huggingface.co/{base})"


def _given_up(pdtrim: Mapping[str, Any]) -> str:
    kept, role = set(pdtrim["kept_blocks"]), pdtrim["role"]
    removed = [block for block in range(pdtrim["num_source_blocks"]) if block not in kept]
    lines = [f"removed blocks (indices of the dense model): {', '.join(map(str, removed)) or 'none'}"]
    lines += [f"block {gone} was distilled into block {into}" for gone, into in pdtrim["distilled_blocks"].items()]
    lines += [
        f"block {block} gives up {PARTS[part]}: what is left of it adds zero to the hidden state"
        for block, part in pdtrim.get("dead_units", {}).items()
    ]
    if "mlp_width" in pdtrim:
        lines.append(f"MLP channels: {pdtrim['mlp_width']:g} of the dense model's, those that weigh most")
    lines.append(f"serves: {'prefill and decode' if role == 'unified' else role}")
    return "\n".join(f"- {line}" for line in lines)


def _markdown(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [table.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
