"""Rules and dashboards: what can be read off the files here in test_*.py, the rest by `python -m tests.monitoring`.

rules/            cases for `promtool test rules`: each alert fires, and doesn't
grafana.py        what Grafana would ask: a dashboard's queries with their variables filled in
prometheus.py     promtool, and a Prometheus of our own that scrapes a service
provoked.py       the service under load, with everything happening to it that a panel shows
__main__.py       all of it, and the verdict
"""
