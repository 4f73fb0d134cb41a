"""What the service exposes, and which series an expression of a rule or a dashboard reads."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from monitoring import SLA_S
from tests.monitoring.prometheus import RULES

ROLES = ("serving", "previous", "candidate")
SELECTOR = re.compile(r"\b(\w+:winnow_\w+:\w+|winnow_\w+|process_\w+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')
Series = tuple[str, dict[str, str]]


def exposed() -> list[Series]:
    """Name and labels of every series of a service that holds a generation in each role, one worker each."""
    pool = SimpleNamespace(workers=[SimpleNamespace(state="alive")], pids=lambda: {0: "self"})
    generation = SimpleNamespace(digest="0" * 64, live=SimpleNamespace(epoch=0))
    one = SimpleNamespace(pool=pool, generation=generation, loaded_at=0.0)
    metrics = Metrics(SLA_S, dict.fromkeys(ROLES, one))
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


def rules() -> list[dict]:
    """Those of all groups of all files."""
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def read_by(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Name and matchers (label, operator, value) of each of our series that an expression names.

    Job and instance are Prometheus' own, and a variable of a dashboard may be anything: both are left out.
    """
    for name, matchers in SELECTOR.findall(expression):
        asked = [m for m in MATCHER.findall(matchers) if m[0] not in ("job", "instance") and "$" not in m[2]]
        yield name, asked


def matches(series: Series, name: str, matchers: list[tuple[str, str, str]]) -> bool:
    def holds(label: str, operator: str, value: str) -> bool:
        found = series[1].get(label, "")
        if operator == "=~":
            return bool(re.fullmatch(value, found))
        return (found == value) == (operator == "=")

    return series[0] == name and all(holds(*matcher) for matcher in matchers)
