"""python -m app.workers SOCKET_FD BUNDLE DIGEST PACED_ROW_S PACE: the process of one worker.

A worker that is getting ready must not slow down those who serve, so importing and loading yield to everybody, in a
thread of the lowest priority: Linux keeps one for each thread, and the main thread's, which will score, stays as it
was. With the pace "urgent" (nobody serves) they don't.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy, faiss and onnxruntime are imported

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module


def main(fd: str, bundle: str, digest: str, paced_row_s: str, pace: str) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for the parent; but in its session, since priorities hold inside one
    with ThreadPoolExecutor(1) as thread:
        if pace == "yields":
            thread.submit(yield_to_everybody)
        worker = thread.submit(import_module, "app.workers.worker").result()  # a second of imports
        ready = thread.submit(worker.prepare, int(fd), bundle, digest, float(paced_row_s)).result()
    ready.serve()


def yield_to_everybody() -> None:
    """The thread that calls this runs only where a core is idle; it makes way at once, which niceness doesn't."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main(*sys.argv[1:])
