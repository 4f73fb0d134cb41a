"""The log: one JSON object a line on standard output, written by a thread of its own.

The event loop only puts records on a queue; a slow reader of our output must not slow an answer down.
"""

import contextlib
import logging
import logging.handlers
import queue
import threading
import time
from typing import Any

import orjson

QUEUE_SIZE = 10_000  # lines waiting to be written; beyond that they are dropped
EVERY_S = 0.05


class Line(logging.Formatter):
    """A record as JSON: time (RFC 3339, UTC), level, logger, message, and the fields of `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().encode(errors="backslashreplace").decode(),  # names of files may be no text
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode()


class _Lossy(logging.handlers.QueueHandler):
    """Drops a line rather than wait for room."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # as it is: formatting is the writer's work

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < QUEUE_SIZE:  # type: ignore[attr-defined]
            self.queue.put_nowait(record)


class Writer(threading.Thread):
    """Writes what waits, all at once: a thread that woke for each line would take the interpreter as often."""

    def __init__(self) -> None:
        super().__init__(name="log", daemon=True)
        self.records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self.is_over = threading.Event()

    def run(self) -> None:
        form = Line()
        while not (self.is_over.wait(EVERY_S) and self.records.empty()):
            lines = [form.format(self.records.get()) for _ in range(self.records.qsize())]
            if lines:
                with contextlib.suppress(OSError):  # a full disk: the lines are lost, the answers are not
                    print(*lines, sep="\n", flush=True)

    def stop(self) -> None:
        """Write the rest and end."""
        self.is_over.set()
        self.join()


def start(level: str) -> Writer:
    """Send all logging to a writer, which writes until its `stop()`."""
    writer = Writer()
    root = logging.getLogger()
    root.handlers = [_Lossy(writer.records)]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel("WARNING")  # what it says at start and stop, we say
    writer.start()
    return writer
