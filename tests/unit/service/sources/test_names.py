from __future__ import annotations

from pathlib import Path

import pytest

from pdtrim.contract.errors import InvalidRequest, SourceNotAllowed
from service.sources import (
    ForbiddenSource,
    InvalidSource,
    SourceError,
    check_allowed,
    parse_model_source,
    parse_text_source,
)
from service.sources.names import check_prefix


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("reference", "reference"),
        ("hf://Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"),
        ("s3://models/llama/8b/", "s3://models/llama/8b"),
        ("s3://models", "s3://models/"),
        ("s3://my_models/a:b/~c&d/ä", "s3://my_models/a:b/~c&d/ä"),
        ("file:///no/such/../model/", "file:///no/model"),
        ("file://localhost/no/model", "file:///no/model"),
        ("file:///no/a%20b", "file:///no/a%20b"),
        ("file:///no/%2e%2e/model", "file:///model"),
    ],
)
def test_model_sources_have_one_spelling(text: str, canonical: str) -> None:
    parsed = parse_model_source(text)

    assert str(parsed) == canonical
    assert parse_model_source(canonical) == parsed


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("builtin:stdlib", "builtin:stdlib"),
        ("file:///no/text.txt", "file:///no/text.txt"),
        ("s3://texts/a/b.jsonl", "s3://texts/a/b.jsonl"),
        ("hf://datasets/acme/wiki", "hf://datasets/acme/wiki"),
        ("hf://datasets/acme/wiki/raw-v1", "hf://datasets/acme/wiki/raw-v1"),
    ],
)
def test_text_sources_have_one_spelling(text: str, canonical: str) -> None:
    parsed = parse_text_source(text)

    assert str(parsed) == canonical
    assert parse_text_source(canonical) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "", "Reference", " reference", "/models/a", "models/a", "builtin:stdlib", "https://example.org/model",
        "file:models", "file://host/models", "file:///a?b", "file:///a#b", "file:///a%00b", "file:///%ff", "file:///a\nb",
        "s3://", "s3://a/b", "s3://Upper/b", "s3://a..b/c", "s3://bucket/../b", "s3://bucket/a//b", "s3://bucket/a?b",
        "hf://", "hf://gpt2", "hf://a/b/c", "hf://datasets/b", "hf://a/..", "hf://a/b--c", "hf://-a/b", "hf://a/b@main",
        "hf://" + "a" * 1024,
    ],
)  # fmt: skip
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(InvalidSource) as caught:
        parse_model_source(text)

    assert isinstance(caught.value, SourceError | ValueError)
    assert isinstance(caught.value, InvalidRequest)
    assert (caught.value.code, caught.value.status) == ("invalid_request", 422)


@pytest.mark.parametrize(
    "text",
    [
        "", "reference", "builtin:other", "file:///a", "file:///a.TXT", "file:///a.parquet.gz", "file:///a.gz", "s3://bucket",
        "s3://bucket/a.csv", "hf://acme/wiki", "hf://datasets/wiki", "hf://datasets/a/b/c/d", "hf://datasets/a/b/..",
    ],
)  # fmt: skip
def test_what_names_no_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidSource):
        parse_text_source(text)


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    with pytest.raises(InvalidSource, match="circle"):
        parse_model_source(f"file://{tmp_path}/a")


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("reference", "reference"),
        ("file:///models/a", "file:///models"),
        ("file:///models/a", "file:///models/"),
        ("file:///models", "file:///models/"),
        ("s3://bucket/a", "s3://bucket/"),
        ("s3://bucket/a", "s3://bucket"),
        ("s3://bucket/a/b", "s3://bucket/a"),
        ("s3://bucket/a", "s3://"),
        ("hf://meta-llama/Llama-3", "hf://meta-llama/"),
        ("hf://meta-llama/Llama-3", "hf://meta-llama/Llama-3"),
        ("hf://meta-llama/Llama-3", "hf://"),
    ],
)
def test_a_prefix_allows_what_is_below_it(text: str, prefix: str) -> None:
    check_allowed(parse_model_source(text), ["hf://other/", prefix])


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("reference", "hf://"),
        ("reference", "file:///"),
        ("file:///models2/a", "file:///models"),
        ("file:///models/../etc", "file:///models"),
        ("file:///models/%2e%2e/etc", "file:///models"),
        ("s3://bucket2/a", "s3://bucket"),
        ("s3://bucket/ab", "s3://bucket/a"),
        ("hf://meta-llama-evil/Llama-3", "hf://meta-llama"),
        ("hf://meta-llama/Llama-3-70B", "hf://meta-llama/Llama-3"),
        ("hf://acme/model", "hf://datasets/"),
    ],
)
def test_a_prefix_allows_nothing_else(text: str, prefix: str) -> None:
    with pytest.raises(ForbiddenSource, match=r"not on the allow list.*PDTRIM_ALLOWED_SOURCES") as caught:
        check_allowed(parse_model_source(text), [prefix])

    assert isinstance(caught.value, SourceNotAllowed)
    assert caught.value.code == "source_not_allowed"


def test_text_sources_are_held_against_the_same_list() -> None:
    check_allowed(parse_text_source("builtin:stdlib"), ["builtin:"])
    check_allowed(parse_text_source("builtin:stdlib"), ["builtin:stdlib"])
    check_allowed(parse_text_source("hf://datasets/acme/wiki/raw"), ["hf://datasets/acme/wiki"])
    with pytest.raises(ForbiddenSource):
        check_allowed(parse_text_source("hf://datasets/acme/wiki"), ["hf://acme/"])
    with pytest.raises(ForbiddenSource):
        check_allowed(parse_text_source("builtin:stdlib"), ["reference"])


def test_links_are_followed_before_the_check_and_their_targets_not_told(tmp_path: Path) -> None:
    (models := tmp_path / "models").mkdir()
    (secret := tmp_path / "secret").mkdir()
    (models / "link").symlink_to(secret)
    (tmp_path / "alias").symlink_to(models)

    with pytest.raises(ForbiddenSource) as caught:
        check_allowed(parse_model_source(f"file://{models}/link"), [models.as_uri()])
    check_allowed(parse_model_source(f"file://{models}/own"), [(tmp_path / "alias").as_uri()])

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["/models", "models", "https://example.org/", ""])
def test_an_entry_of_the_allow_list_that_can_match_nothing_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="PDTRIM_ALLOWED_SOURCES has the entry"):
        check_prefix(prefix)
