"""What a data set's card on the hub tells of its rows, before any is read. Anybody writes cards; many say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.sources.errors import UnreadableSource
from service.sources.names import HubDataset
from service.sources.rows import MESSAGES, PROMPT, TEXT, listed

DEFAULT = "default"
"""What a data set's only configuration is called, or the one that is read where none is named."""


def check_card(card: Mapping[str, Any], dataset: HubDataset, split: str, field: str | None = None) -> None:
    """Hold the configuration, the split and the field that is read against a card, as far as it lists any.

    (https://huggingface.co/docs/hub/datasets-manual-configuration) Raises: UnreadableSource.
    """
    configs = _objects(card.get("configs"))
    names = [str(config["config_name"]) for config in configs if "config_name" in config]
    if names and dataset.config is not None and dataset.config not in names:
        raise UnreadableSource(f"{dataset} does not exist: the data set has the configurations {listed(names)}.")
    if len(names) > 1 and dataset.config is None and DEFAULT not in names and not any(map(_is_default, configs)):
        raise UnreadableSource(f"{dataset} has several configurations; give {dataset}/ and one of {listed(names)}.")
    for config in _chosen(configs, dataset):
        _check_split([file.get("split") for file in _objects(config.get("data_files"))], dataset, split)
    for described in _chosen(_objects(card.get("dataset_info")), dataset):
        _check_split([one.get("name") for one in _objects(described.get("splits"))], dataset, split)
        columns = [one.get("name") for one in _objects(described.get("features"))]
        wanted = [TEXT, MESSAGES, PROMPT] if field is None else [field]
        if columns and not set(wanted) & set(map(str, columns)):
            raise UnreadableSource(
                f"{dataset} has no field {' or '.join(f'`{name}`' for name in wanted)}; its rows have "
                f"{listed(columns)}. Name the field to read with data.field."
            )


def _chosen(found: list[dict[str, Any]], dataset: HubDataset) -> list[dict[str, Any]]:
    """What is said of the configuration that will be read: what is said alone, or under its name."""
    if len(found) == 1:
        return found
    named = [one for one in found if one.get("config_name") == dataset.config]
    marked = [one for one in found if _is_default(one)] or [one for one in found if one.get("config_name") == DEFAULT]
    return named or (marked if dataset.config is None else [])


def _is_default(config: Mapping[str, Any]) -> bool:
    return config.get("default") is True


def _check_split(splits: list[Any], dataset: HubDataset, split: str) -> None:
    if splits and None not in splits and split not in splits:
        raise UnreadableSource(
            f"{dataset} has no split `{split}`; it has {listed(splits)}. Name the one to read with data.split."
        )


def _objects(found: Any) -> list[dict[str, Any]]:
    """Objects, one alone or a list of them; none where it is anything else."""
    found = [found] if isinstance(found, dict) else found
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else []
