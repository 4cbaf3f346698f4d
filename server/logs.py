"""One JSON object a line on standard error. Fields are named one by one: nothing a user sent can slip in."""

from __future__ import annotations

import json
import logging
import sys
import time

from retrieval.errors import BackendError

FIELDS = ("request_id", "caller", "method", "route", "status", "ms")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            # The kind and the place, not the words: an error's words may quote what was sent. Those of the machine's
            # faults are ours and never do; without them nobody could tell a full disk from a damaged one.
            line["error"] = record.exc_info[0].__name__
            if isinstance(record.exc_info[1], BackendError):
                line["why"] = str(record.exc_info[1])
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                line["place"] = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
        return json.dumps(line)


def configure() -> None:
    """Structured lines for our loggers and uvicorn's errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("lightbox").setLevel(logging.INFO)  # what libraries tell in passing is not ours to log
