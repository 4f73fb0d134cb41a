"""Imported by the server of forks alone: it and all that is forked from it leave a stop to the service's main process.

systemd, for one, sends SIGTERM to all processes of a service. Who ended at once would leave what is under way without
re-ranking, and the service without a word of how its workers end; they end when it closes their sockets.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
