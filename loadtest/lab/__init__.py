"""The load lab: `attack`, `compare`, `report` and `search` of `python -m loadtest`.

attack.py      one run of open_loop.py against a service, and what is kept of it
compare.py     two kept runs together; redraw.py: the page of one, again
search.py      the highest rate that a service holds
options.py     options that they share; target.py: what is attacked; bodies.py: what is asked
live.py        progress on the terminal
run.py         a run as it is kept; record.py: how it comes from what was observed, and whether it is valid
difference.py  what differs between two, with intervals
page.py        the report; plots.py: its pictures
where.py       machine, versions, commit
"""
