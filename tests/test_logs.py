"""Log lines: what an operator needs, and nothing that a user sent."""

from __future__ import annotations

import json
import logging

import pytest

from retrieval.errors import BackendError
from server import logs


def logged(error: Exception, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The line that an error leaves."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure()
    try:
        raise error
    except Exception:
        logging.getLogger("lightbox").exception("backend error", extra={"request_id": "r1", "body": "a report"})
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    line: dict[str, object] = json.loads(capsys.readouterr().err)
    return line


def test_a_fault_of_the_machine_is_told_in_our_words(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(BackendError("opening the store: the disk is full"), capsys)
    assert line["why"] == "opening the store: the disk is full"
    assert (line["error"], line["level"], line["request_id"]) == ("BackendError", "error", "r1")


def test_what_was_sent_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(ValueError("a report"), capsys)
    assert "a report" not in json.dumps(line)
    assert line["error"] == "ValueError"
    assert str(line["place"]).startswith("tests.test_logs:")
