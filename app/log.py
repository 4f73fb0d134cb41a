"""The log: one JSON object a line on standard output, written by a thread of its own.

The event loop only puts records on a queue; a slow reader of our output must not slow an answer down. A line is written
up to EVERY_S after it was said.
"""

import logging
import logging.handlers
import queue
import sys
import time

import orjson

QUEUE_SIZE = 10_000  # lines waiting to be written; beyond that they are dropped
EVERY_S = 0.05  # seconds; a thread that wakes for each line also takes the interpreter from the loop for each


class Line(logging.Formatter):
    """A record as JSON: time (RFC 3339, UTC), level, logger, message, and the fields of `extra={"fields": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name}
        # Names of files may be no text.
        line["message"] = record.getMessage().encode(errors="backslashreplace").decode()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode()


class _Lossy(logging.handlers.QueueHandler):
    """Drops a line rather than wait for room."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # as it is: formatting is the listener's work

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < QUEUE_SIZE:  # type: ignore[attr-defined]
            self.queue.put_nowait(record)


class _Unhurried(logging.handlers.QueueListener):
    """Many lines at a time: a thread that woke for each would take the interpreter from the loop as often."""

    def dequeue(self, block: bool) -> logging.LogRecord:
        if self.queue.empty():  # type: ignore[attr-defined]
            time.sleep(EVERY_S)
        return super().dequeue(block)


def start(level: str) -> logging.handlers.QueueListener:
    """Send all logging through the queue; call `stop()` on what is returned to write the rest."""
    output = logging.StreamHandler(sys.stdout)
    output.setFormatter(Line())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.basicConfig(handlers=[_Lossy(lines)], level=level.upper(), force=True)
    logging.getLogger("uvicorn.error").setLevel("WARNING")  # what it says at start and stop, we say
    listener = _Unhurried(lines, output)
    listener.start()
    return listener
