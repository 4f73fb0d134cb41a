"""What Grafana would ask Prometheus for a dashboard: every panel, annotation and variable, with `$…` filled in."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.panels import FOLDER

Json = dict[str, Any]
DASHBOARDS: tuple[Json, ...] = tuple(json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json")))
LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), *(?P<label>\w+)\)")
MOST_POINTS = 1_000  # a panel is about so many pixels wide


@dataclass(frozen=True, slots=True)
class Asked:
    """One query, as it stands in the file."""

    dashboard: str
    what: str
    ref: str
    expression: str
    is_instant: bool = False


def queries(dashboard: Json) -> Iterator[Asked]:
    """Those of panels and annotations."""
    title = dashboard["title"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Asked(title, panel["title"], target["refId"], target["expr"], target["instant"])
    for annotation in dashboard["annotations"]["list"]:
        yield Asked(title, f"annotation: {annotation['name']}", "", annotation["expr"])


def variables(dashboard: Json) -> list[Json]:
    """In their order, in which a later one may name an earlier one; without that of the source."""
    return [v for v in dashboard["templating"]["list"] if v["type"] != "datasource"]


def filled_in(expression: str, chosen: Mapping[str, str], seconds: float, scrape_s: float) -> str:
    """The expression as Grafana sends it for a time range of so many seconds. Raises KeyError for an unknown name."""
    step = step_s(seconds, scrape_s)
    of_time = {"__interval": step, "__rate_interval": max(step + scrape_s, 4 * scrape_s), "__range": seconds}
    values = {name: f"{value:.0f}s" for name, value in of_time.items()} | dict(chosen)
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def step_s(seconds: float, scrape_s: float) -> float:
    """Between two points of a panel."""
    return max(scrape_s, seconds / MOST_POINTS)


def regex(values: list[str]) -> str:
    """What "All" of a variable with several values becomes."""
    return values[0] if len(values) == 1 else f"({'|'.join(map(re.escape, values))})"
