"""What a data set's card says is held against what will be read; a card that says nothing refuses nothing."""

from __future__ import annotations

from typing import Any

import pytest

from service.sources import UnreadableSource
from service.sources.cards import check_card
from service.sources.names import HubDataset

TEXT = [{"name": "id", "dtype": "int64"}, {"name": "text", "dtype": "string"}]
TWO = {"configs": [{"config_name": "en", "data_files": "en/*"}, {"config_name": "de", "data_files": "de/*"}]}


@pytest.mark.parametrize(
    ("card", "config"),
    [
        ({}, None),
        ({"configs": "all of them", "dataset_info": 7}, "en"),
        ({"configs": [], "dataset_info": [7, None]}, None),
        ({"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*"}]}]}, None),
        ({"configs": [{"config_name": "default", "data_files": "data.csv"}]}, None),
        ({"configs": [{"config_name": "default", "data_files": ["a.csv", "b.csv"]}]}, None),
        ({"dataset_info": {"features": TEXT, "splits": [{"name": "train"}, {"name": "test"}]}}, None),
        (TWO, "de"),
        ({"configs": [{**TWO["configs"][0], "default": True}, TWO["configs"][1]]}, None),
        ({"dataset_info": [{"config_name": "qa", "features": [{"name": "q"}]}, {"config_name": "en"}]}, "en"),
    ],
)
def test_what_a_card_allows_or_does_not_say_passes(card: dict[str, Any], config: str | None) -> None:
    check_card(card, HubDataset("acme/wiki", config), "train")


@pytest.mark.parametrize(
    ("card", "config", "complaint"),
    [
        (TWO, "fr", r"hf://datasets/acme/wiki/fr does not exist: .* configurations en, de\."),
        (TWO, None, r"has several configurations; give hf://datasets/acme/wiki/ and one of en, de\."),
        (
            {"configs": [{"config_name": "default", "data_files": [{"split": "test", "path": "t"}]}]},
            None,
            r"has no split `train`; it has test\. Name the one to read with data\.split\.",
        ),
        ({"dataset_info": {"splits": [{"name": "validation"}]}}, None, r"has no split `train`.* validation\."),
        (
            {"dataset_info": {"features": [{"name": "question"}]}},
            None,
            r"has no field `text` or `messages` or `prompt`; its rows have question",
        ),
        (
            {"dataset_info": [{"config_name": "qa", "features": [{"name": "q"}]}, {"config_name": "en"}]},
            "qa",
            "has no field `text`",
        ),
    ],
)
def test_what_a_card_rules_out_is_refused_by_name(card: dict[str, Any], config: str | None, complaint: str) -> None:
    with pytest.raises(UnreadableSource, match=complaint):
        check_card(card, HubDataset("acme/wiki", config), "train")


def test_another_split_and_field_are_held_against_the_card() -> None:
    features = [{"name": "question"}, {"name": "answer"}]
    card = {"dataset_info": {"features": features, "splits": [{"name": "train"}, {"name": "test"}]}}
    check_card(card, HubDataset("acme/wiki"), "test", "answer")
    with pytest.raises(UnreadableSource, match=r"has no split `dev`; it has train, test\. .* data\.split"):
        check_card(card, HubDataset("acme/wiki"), "dev", "answer")
    with pytest.raises(UnreadableSource, match=r"has no field `body`; its rows have question, answer\."):
        check_card(card, HubDataset("acme/wiki"), "test", "body")


@pytest.mark.parametrize("field", ["messages", "prompt", "text"])
def test_rows_of_every_kind_pass(field: str) -> None:
    check_card({"dataset_info": {"features": [{"name": field}]}}, HubDataset("acme/wiki"), "train")
