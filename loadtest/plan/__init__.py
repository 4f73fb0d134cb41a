"""`python -m loadtest plan`: how many machines it takes, and what they will do; `capacity` checks it by measurement.

measure.py      two minutes with the real service, from outside ─▶ a calibration
calibration.py  what was measured, as JSON
costs.py        what a stage costs by its width; powers, with intervals
speed.py        how fast the machine is at this moment
recipe.py       WHO RUNS WHAT: a configuration ─▶ stations and steps
simulation.py   stations and steps ─▶ latencies; knows no funnel
fit.py          the two numbers of the machine that no meter shows, from runs under load
planning.py     rates, machines, memory, money
widths.py       the cheapest widths that keep a quality floor
memory.py       bytes an item by kind of index
draw.py         --what-if as a picture
report.py       the plan in words
command.py      the command line of `plan`
bench.py        predictions against measurements: `capacity`
"""
