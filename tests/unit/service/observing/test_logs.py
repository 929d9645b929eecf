from __future__ import annotations

import logging
import sys
import threading
import warnings
from pathlib import Path

import pytest
from structlog.contextvars import bound_contextvars

from service.observing.logs import chosen_format
from service.settings import Settings
from tests.observing import lines, logged


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, log_format="json")


def test_every_line_is_one_object_with_what_was_bound_and_given(settings: Settings) -> None:
    with logged(settings) as stream, bound_contextvars(job_id="job_1", attempt=2):
        logging.getLogger("workers.running.attempt").info("stage %s", "ended", extra={"seconds": 1.5})
        logging.getLogger("workers.running.attempt").debug("too much")
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "stage ended",
        "level": "info",
        "logger": "workers.running.attempt",
        "job_id": "job_1",
        "attempt": 2,
        "seconds": 1.5,
    }


@pytest.mark.parametrize("name", ["uvicorn.error", "celery.worker", "transformers.modeling_utils"])
def test_libraries_with_handlers_of_their_own_log_in_the_same_form_once(settings: Settings, name: str) -> None:
    library = logging.getLogger(name.partition(".")[0])
    own = logging.StreamHandler()
    library.addHandler(own)
    library.propagate = False
    try:
        with logged(settings) as stream:
            logging.getLogger(name).error("line\nbreak", extra={"color_message": "again"})
        assert library.handlers[-1] is own
    finally:
        library.removeHandler(own)
        library.propagate = True
    assert [(line["logger"], line["event"], line.get("color_message")) for line in lines(stream)] == [
        (name, "line\nbreak", None)
    ]


def test_exceptions_and_warnings_are_lines_too(settings: Settings) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with logged(settings) as stream:
        try:
            fail()
        except RuntimeError as error:
            logging.getLogger("a").exception("caught")
            sys.excepthook(RuntimeError, error, error.__traceback__)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        warnings.warn("careful", stacklevel=1)

    found = lines(stream)
    assert [line["event"] for line in found[:3]] == ["caught", "uncaught exception", "uncaught exception"]
    assert all(line["exception"].endswith("RuntimeError: broken") for line in found[:3])
    assert "careful" in found[3]["event"]


def test_the_form_is_the_readers_unless_one_is_set(settings: Settings, tmp_path: Path) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    unset = Settings(data_dir=tmp_path, log_format=None)
    with (tmp_path / "log").open("w") as file:
        assert chosen_format(unset, file) == "json"
        assert chosen_format(settings.model_copy(update={"log_format": "console"}), file) == "console"
    assert chosen_format(unset, Terminal()) == "console"  # type: ignore[arg-type]


def test_console_lines_are_plain_text_with_the_same_content(settings: Settings) -> None:
    console = settings.model_copy(update={"log_format": "console", "log_level": "DEBUG"})
    with logged(console) as stream, bound_contextvars(request_id="r1"):
        logging.getLogger("a").debug("seen")
        try:
            raise RuntimeError("password=hunter2")
        except RuntimeError:
            logging.getLogger("a").exception("caught")
    text = stream.getvalue()
    assert text.splitlines()[0].endswith("request_id=r1")
    assert "seen" in text
    assert "RuntimeError: password=***" in text
    assert "\x1b" not in text


def test_the_level_is_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTRIM_LOG_LEVEL", "warning")
    assert Settings().log_level == "WARNING"
