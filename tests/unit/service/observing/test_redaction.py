from __future__ import annotations

import json
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.observing import redaction
from service.observing.redaction import MASK, redact, scrub

KEY = "pdt_1f3b6a4c7de0_" + "5e" * 32


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment whose secrets are read anew."""
    redaction._known.cache_clear()
    yield monkeypatch
    redaction._known.cache_clear()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"key {KEY} refused", f"key pdt_{MASK} refused"),
        ("hf_" + "aB3" * 11, f"hf_{MASK}"),
        ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD=", f"whsec_{MASK}"),
        ("postgresql+psycopg://u:hunter2@h:5432/db?x=1", f"postgresql+psycopg://u:{MASK}@h:5432/db?x=1"),
        ("redis://:p@ss/w:rd@h and redis://h/0", f"redis://:{MASK}@h and redis://h/0"),
        ("git+https://ghp_x1@github.com/x", f"git+https://{MASK}@github.com/x"),
        ("Authorization: Bearer short", f"Authorization: Bearer {MASK}"),
        ("{'authorization': 'Bearer abc.def'}", f"{{'authorization': 'Bearer {MASK}'}}"),
        ("(b'authorization', b'Basic dXNlcjpwYXNz')", f"(b'authorization', b'Basic {MASK}')"),
        ("authorization=hidden", f"authorization={MASK}"),
        ("sent Bearer abcdefghij", f"sent Bearer {MASK}"),
        (
            "AWS4-HMAC-SHA256 Credential=AKIA/s3, SignedHeaders=host;date, Signature=0a1b",
            f"AWS4-HMAC-SHA256 Credential={MASK}, SignedHeaders=host;date, Signature={MASK}",
        ),
        (
            "/x?X-Amz-Date=1&X-Amz-Signature=ab&X-Amz-Security-Token=c%2B&X-Amz-Expires=9",
            f"/x?X-Amz-Date=1&X-Amz-Signature={MASK}&X-Amz-Security-Token={MASK}&X-Amz-Expires=9",
        ),
        ("?token=abc&key=def&limit=5", f"?token={MASK}&key={MASK}&limit=5"),
        ("host=h password=hunter2 dbname=d", f"host=h password={MASK} dbname=d"),
        ('{"aws_secret_access_key": "a/b", "n": 1}', f'{{"aws_secret_access_key": "{MASK}", "n": 1}}'),
        ("AWS_SESSION_TOKEN=a/b", f"AWS_SESSION_TOKEN={MASK}"),
        ("x-api-key: abc", f"x-api-key: {MASK}"),
    ],
)
def test_a_secret_is_masked_and_what_is_around_it_stays(text: str, left: str) -> None:
    assert redact(text) == left
    assert redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "Send the header `Authorization: Bearer <key>` with a key of this service.",
        "The gateway failed to answer. Its log has the details under this request id.",
        "https://store:9000/bucket/jobs/job_1/file, s3://bucket/a and file:///models/a@b",
        "heal_tokens: 4096, tokens=5, first_token: prefill, design=2, lora_alpha=32",
        "scoring of job_0198a3f25e0e7c52b3a0d1f3b6a4c7de: attempt 2 is no longer the one that counts",
        "hf://meta-llama/Llama-3 and hf_transfer, a pdt_ prefix",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_the_environments_secrets_are_known_by_their_values(known: pytest.MonkeyPatch) -> None:
    known.setenv("PDTRIM_API_KEY", "operators")
    known.setenv("AWS_SECRET_ACCESS_KEY", secret := "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    known.setenv("PDTRIM_DATABASE_URL", "postgresql://u:p%40ssword1@h/d")
    known.setenv("PDTRIM_BROKER_URL", "redis://pdtrim:pdtrim@h/0")
    known.setenv("PDTRIM_DATA_DIR", "/var/lib/ordinary")
    known.setenv("OTHER_TOKEN", "abc")

    quoted = f"operators, cooperators; p@ssword1; x{quote(secret, safe='')}x; pdtrim abc /var/lib/ordinary"
    assert redact(quoted) == f"{MASK}, cooperators; {MASK}; x{MASK}x; pdtrim abc /var/lib/ordinary"


def test_data_stays_data_and_loses_what_stands_under_a_secrets_name() -> None:
    data = {
        "progress": 0.5,
        "attempt": 2,
        "done": True,
        "error": None,
        "Authorization": "anything",
        "db_password": {"nested": 1},
        "password": "",
        "list": [KEY, ("a", 1)],
        "what": ValueError("password=x"),
        KEY: 1,
    }
    assert scrub(data) == {
        "progress": 0.5,
        "attempt": 2,
        "done": True,
        "error": None,
        "Authorization": MASK,
        "db_password": MASK,
        "password": "",
        "list": [f"pdt_{MASK}", ["a", 1]],
        "what": f"password={MASK}",
        f"pdt_{MASK}": 1,
    }


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=10))
def test_whatever_is_scrubbed_can_be_written_as_json(data: object) -> None:
    json.dumps(scrub(data), allow_nan=True)


@pytest.mark.parametrize(
    "piece", ["a", "://", "://a:", "secret", "secret-", "password ", "authorization:", "bearer ", "pdt_", "x@", "?key="]
)
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (65_536 // len(piece))
    started = time.process_time()
    scrub({text: text})
    assert time.process_time() - started < 2
