"""`python -m loadtest plan`: how many machines it takes, and what they will do; `capacity` checks it by measurement.

measure.py      some minutes with the real service, from outside ─▶ a calibration
metering.py     whose CPU and whose memory it was, from /proc
demand.py       single requests ─▶ what a request takes whom, by width
calibration.py  what was measured, as JSON
costs.py        lines over widths; powers, with intervals
fit.py          the numbers of the machine that no meter shows, from runs under load
complexity.py   how cost grows with catalogue, width and model
recipe.py       WHO RUNS WHAT: a configuration ─▶ stations and steps
simulation.py   stations and steps ─▶ latencies; knows no funnel
planning.py     rates, machines, headroom, money
widths.py       the cheapest widths that keep a quality floor
memory.py       bytes an item by kind of index
classic.py      documents over shards, parameters by hand
report.py       the plan in words
what_if.py      --what-if: one parameter varied
draw.py         it as a picture
command.py      the command line of `plan`
bundles.py      bundles of other widths and sizes, made by the offline half
again.py        what the machine is like by now, told by the calibrated configuration asked again
bench.py        predictions against measurements: `capacity`
"""
