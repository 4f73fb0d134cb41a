"""Load and faults, from outside: everything here speaks HTTP to a service that runs as a process of its own.

    arrivals.py     when requests are due
    open_loop.py    requests at the instants they are due, whatever the answers do
    tally.py        what a generator has done so far; spool.py: the bodies of answers in a long run
    observed.py     what came back, in columns; latencies in a histogram
    search.py       the highest rate that holds, and a ramp to the peak
    capacity.py     the highest rate at which a service is quick and whole
    launch.py       a service as a process: start, log, metrics, workers, stop
    noop.py         a server that does nothing, for control
    agreement.py    an answer against the full funnel's own: NDCG, loss, bootstrap, the same list
    table.py        figures, bars, the printed table, the line of JSON
    drawing.py      pictures as inline SVG
    lab/            `python -m loadtest attack`, `compare`, `report`, `search`: runs, kept and drawn
    faults/         the rows of `python -m loadtest faults`
    limits/         the raw kernels, and what the service costs over them: `python -m loadtest limits`
    bench_speed.py  the bars of that on W1
    plan/           `python -m loadtest plan`, and `capacity`, which checks it

Nothing here imports the service or the offline half, but limits/kernels.py, which times what a service is made of.
"""
