"""`python -m loadtest limits`: what the service costs over the raw kernels that no service can do without.

kernels.py      one request's least work by hand, timed part by part; a process of its own, and the only module of
                loadtest/ that imports the service
bare_loop.py    that process from outside: hot, paced, its answers
cpu.py          CPU seconds of a tree of processes, by process and thread
measure.py      kernels and service in turn, and the ratios of neighbours
command.py      the command line, the table, the line of JSON
"""
