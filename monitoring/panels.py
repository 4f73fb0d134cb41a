"""The kinds of panel, and a dashboard from rows of them: Grafana's classic JSON model, of Grafana 11 and later.

A panel says what it shows, in which unit, and where its colours change; places and ids are given here, row by row from
the left. What a dashboard shows is decided in on_call.py and models.py. It is over 250 lines because each kind of panel
is one function, most of them Grafana's option names.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitoring.queries import of

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
SCHEMA_VERSION = 39  # Grafana 11.0; later ones bring it up to their own
WIDTH = 24  # of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
REFRESH = 2  # a variable's values are asked for again when the time range changes

GREEN, YELLOW, ORANGE, RED = "green", "yellow", "orange", "red"
LETTERS = "ABCDEFGHIJKL"  # of a panel's queries
Steps = Sequence[tuple[float | None, str]]  # from which value on which colour; the first from None
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. legend: "{{label}}" stands for a label's value."""

    expression: str
    legend: str = ""
    form: str = "time_series"
    is_instant: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel, without its place. look: its field options. settings: keys of its JSON that only its kind has."""

    kind: str
    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int
    height: int
    steps: Steps = ((None, GREEN),)
    look: JsonObject = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)


LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}  # of a query's points, the one that is shown
NO_LEGEND = {"showLegend": False, "displayMode": "list", "placement": "bottom", "calcs": []}


def number(title: str, description: str, unit: str, expression: str, steps: Steps, decimals: int = 2) -> Panel:
    """The present value, large, coloured by its steps, over its course."""
    options: JsonObject = {
        "reduceOptions": LAST,
        "colorMode": "background",
        "graphMode": "area",
        "textMode": "value",
        "justifyMode": "center",
        "orientation": "auto",
        "wideLayout": True,
    }
    look: JsonObject = {"color": {"mode": "thresholds"}, "decimals": decimals}
    return Panel("stat", title, description, unit, [Query(expression)], 4, 4, steps, look, {"options": options})


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = ((None, GREEN),),
    least: float | None = None,
    most: float | None = None,
    is_stacked: bool = False,
    width: int = 8,
) -> Panel:
    """Series over time; steps beyond the first are drawn as lines."""
    custom: JsonObject = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if is_stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if len(steps) > 1 else "off"},
        "scaleDistribution": {"type": "linear"},
    }
    look: JsonObject = {"color": {"mode": "palette-classic"}, "custom": custom}
    look |= {name: value for name, value in (("min", least), ("max", most)) if value is not None}
    legend = {
        "displayMode": "table",
        "placement": "bottom",
        "showLegend": True,
        "calcs": ["mean", "max", "lastNotNull"],
    }
    options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return Panel("timeseries", title, description, unit, queries, width, 9, steps, look, {"options": options})


def heat(title: str, description: str, unit: str, expression: str, width: int = 12) -> Panel:
    """A histogram's buckets over time; the expression keeps the label le."""
    color: JsonObject = {"mode": "scheme", "scheme": "Oranges", "steps": 64, "reverse": False}
    color |= {"fill": "dark-orange", "scale": "exponential", "exponent": 0.5}
    options: JsonObject = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": "cps"},
        "color": color,
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    look = {"custom": {"scaleDistribution": {"type": "linear"}}}
    query = Query(expression, "{{le}}", form="heatmap")
    return Panel("heatmap", title, description, unit, [query], width, 9, look=look, settings={"options": options})


def bars(title: str, description: str, unit: str, *queries: Query, steps: Steps, width: int = 8) -> Panel:
    """One horizontal bar a query, in their order."""
    options: JsonObject = {
        "reduceOptions": LAST,
        "orientation": "horizontal",
        "displayMode": "basic",
        "valueMode": "color",
        "namePlacement": "left",
        "showUnfilled": True,
        "sizing": "auto",
        "minVizHeight": 16,
        "minVizWidth": 8,
        "maxVizHeight": 300,
        "legend": NO_LEGEND,
    }
    look: JsonObject = {"color": {"mode": "thresholds"}, "min": 0}
    return Panel("bargauge", title, description, unit, queries, width, 9, steps, look, {"options": options})


def columns(
    title: str, description: str, unit: str, *named: tuple[str, str], hidden: str = "", width: int = 8
) -> Panel:
    """A bar chart over the label `step`: a bar for each (name, expression), side by side.

    hidden: the name of one that isn't seen; then they stand on each other, and what is seen begins where it ends.
    """
    renamed = {f"Value #{letter}": name for letter, (name, _) in zip(LETTERS[: len(named)], named, strict=True)}
    times = {"Time": True} | {f"Time {number}": True for number in range(1, len(named) + 1)}
    transformations = [
        {"id": "joinByField", "options": {"byField": "step", "mode": "outer"}},
        {"id": "organize", "options": {"excludeByName": times, "renameByName": renamed}},
        {"id": "sortBy", "options": {"sort": [{"field": "step", "desc": False}]}},
    ]
    options: JsonObject = {
        "orientation": "horizontal",
        "xField": "step",
        "stacking": "normal" if hidden else "none",
        "showValue": "auto",
        "barWidth": 0.9,
        "groupWidth": 0.8,
        "barRadius": 0,
        "fullHighlight": False,
        "xTickLabelRotation": 0,
        "xTickLabelMaxLength": 0,
        "xTickLabelSpacing": 0,
        "legend": NO_LEGEND | {"showLegend": not hidden},
        "tooltip": {"mode": "multi", "sort": "none"},
    }
    unseen = [
        {"id": "color", "value": {"mode": "fixed", "fixedColor": "transparent"}},
        {"id": "custom.hideFrom", "value": {"legend": True, "tooltip": True, "viz": False}},
    ]
    overrides = [{"matcher": {"id": "byName", "options": hidden}, "properties": unseen}] if hidden else []
    look = {"color": {"mode": "palette-classic"}, "custom": {"fillOpacity": 80, "lineWidth": 0, "gradientMode": "none"}}
    settings = {"options": options, "transformations": transformations, "overrides": overrides}
    queries = [Query(expression, form="table", is_instant=True) for _, expression in named]
    return Panel("barchart", title, description, unit, queries, width, 9, look=look, settings=settings)


def table(
    title: str, description: str, expression: str, shown: Sequence[str], width: int = 8, height: int = 9
) -> Panel:
    """The labels of an instant vector's series, those of `shown` in this order."""
    order = {name: place for place, name in enumerate(shown)}
    transformations = [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(shown)}}},
        {"id": "organize", "options": {"excludeByName": {}, "indexByName": order, "renameByName": {}}},
    ]
    footer = {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""}
    options = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0, "footer": footer}
    look: JsonObject = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}}}
    settings = {"options": options, "transformations": transformations}
    query = Query(expression, form="table", is_instant=True)
    return Panel("table", title, description, "short", [query], width, height, look=look, settings=settings)


# ------------------------------------------------------------------------------------------- the dashboard


@dataclass(frozen=True, slots=True)
class Variable:
    """What the reader chooses. values: a query for a label's values, or the values themselves."""

    name: str
    label: str
    values: str | Sequence[str]
    is_multiple: bool = False
    chosen: str = ""


def dashboard(
    uid: str, title: str, description: str, variables: Iterable[Variable], rows: Iterable[tuple[str, Sequence[Panel]]]
) -> JsonObject:
    """Grafana's JSON. Raises ValueError for a panel that is wider than the grid."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["winnow"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_link()],
        "annotations": {"list": _annotations()},
        "templating": {"list": [_source(), *map(_variable, variables)]},
        "panels": _placed(rows),
    }


def as_json(made: JsonObject) -> str:
    """As it stands in the file."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _placed(rows: Iterable[tuple[str, Sequence[Panel]]]) -> list[JsonObject]:
    """Row headers and panels with ids and places; a panel that no longer fits beside the last begins a new line."""
    placed: list[JsonObject] = []
    y = 0
    for title, panels in rows:
        header: JsonObject = {"type": "row", "title": title, "collapsed": False, "panels": []}
        placed.append(header | {"id": len(placed) + 1, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, y, tallest = 0, y + 1, 0
        for panel in panels:
            if panel.width > WIDTH:
                raise ValueError(f"{panel.title}: {panel.width} wide; the grid has {WIDTH}")
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            placed.append(_panel(panel) | {"id": len(placed) + 1, "gridPos": place})
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return placed


def _panel(panel: Panel) -> JsonObject:
    steps = [{"value": value, "color": color} for value, color in panel.steps]
    shown = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}} | panel.look
    settings = dict(panel.settings)
    overrides = settings.pop("overrides", [])
    letters = LETTERS[: len(panel.queries)]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": shown, "overrides": overrides},
        "targets": [_target(query, letter) for letter, query in zip(letters, panel.queries, strict=True)],
    } | settings


def _target(query: Query, letter: str) -> JsonObject:
    asked: JsonObject = {"refId": letter, "datasource": SOURCE, "editorMode": "code", "expr": query.expression}
    return asked | {
        "legendFormat": query.legend or "__auto",
        "format": query.form,
        "instant": query.is_instant,
        "range": not query.is_instant,
    }


def _link() -> JsonObject:
    """To the other dashboard, with the time and what is chosen."""
    link: JsonObject = {"type": "dashboards", "tags": ["winnow"], "title": "Winnow", "icon": "external link"}
    return link | {"includeVars": True, "keepTime": True, "asDropdown": False, "targetBlank": False}


def _source() -> JsonObject:
    chosen = {"text": "Prometheus", "value": "prometheus"}
    return {"type": "datasource", "name": "datasource", "label": "Source", "query": "prometheus", "current": chosen}


def _variable(v: Variable) -> JsonObject:
    common: JsonObject = {"name": v.name, "label": v.label, "multi": v.is_multiple, "includeAll": v.is_multiple}
    if isinstance(v.values, str):
        chosen = {"text": ["All"], "value": ["$__all"]} if v.is_multiple else {}
        asked = {"query": v.values, "refId": "PrometheusVariableQueryEditor-VariableQuery", "qryType": 1}
        more: JsonObject = {
            "type": "query",
            "datasource": SOURCE,
            "query": asked,
            "definition": v.values,
            "current": chosen,
        }
        return common | more | {"refresh": REFRESH, "sort": 1, "regex": ""}
    options = [{"text": value, "value": value, "selected": value == v.chosen} for value in v.values]
    more = {"type": "custom", "query": ", ".join(v.values), "options": options}
    return common | more | {"current": {"text": v.chosen, "value": v.chosen}}


def _annotations() -> list[JsonObject]:
    serving = of("winnow_generation_info", 'role="serving"')
    changed = f"{serving} unless on (job, instance, digest) ({serving} offset 1m)"
    firing = 'ALERTS{alertname=~"Winnow.*", alertstate="firing"}'
    return [
        _annotation("Generations", "blue", changed, "{{instance}} serves {{digest}}", "a generation began to serve"),
        _annotation("Alerts", "red", firing, "{{alertname}}", "{{severity}} {{instance}} {{window}}"),
    ]


def _annotation(name: str, color: str, expression: str, title: str, text: str) -> JsonObject:
    what: JsonObject = {"name": name, "datasource": SOURCE, "enable": True, "hide": False, "iconColor": color}
    return what | {"expr": expression, "step": "15s", "titleFormat": title, "textFormat": text, "tagKeys": ""}
