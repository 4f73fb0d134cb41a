"""Histograms: counted together, and the same as if each observation had been counted by itself."""

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st

from app import metrics
from app.metrics import Histogram

VALUES = st.lists(st.tuples(st.sampled_from("ab"), st.floats(-100, 100, allow_subnormal=False)), max_size=40)
EDGES = st.sampled_from([(0, 0.5, 1), (-1, 0, 1), (0.001, 0.01)])


def exposed(registry) -> list[str]:
    return sorted(prometheus_client.generate_latest(registry).decode().splitlines())


@given(VALUES, EDGES)
def test_a_histogram_is_exposed_as_the_librarys_own(values, edges):
    ours, theirs = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    own = Histogram("x_seconds", "What.", edges, {"arm": "ab"})
    ours.register(own)
    other = prometheus_client.Histogram("x_seconds", "What.", ("arm",), buckets=edges, registry=theirs)
    for arm in "ab":
        other.labels(arm)
    for arm, value in values:
        value = round(value, 1)  # so that some lie on an edge
        own.labels(arm).observe(value)
        other.labels(arm).observe(value)
    without_sums = [[line for line in exposed(r) if "_sum{" not in line] for r in (ours, theirs)]
    assert without_sums[0] == without_sums[1]
    for arm in "ab" if edges[0] >= 0 else ():
        sums = [r.get_sample_value("x_seconds_sum", {"arm": arm}) for r in (ours, theirs)]
        assert abs(sums[0] - sums[1]) < 1e-9


def test_observations_do_not_pile_up_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(metrics, "MANY", 3)
    seen = Histogram("x", "What.", (1,), {}).labels()
    for value in (0.5, 2.0, 3.0, 1.0):
        seen.observe(value)
    assert (seen.counts.tolist(), seen.values) == ([1, 2], [1.0])
