"""What can be said of the dashboards without Grafana and Prometheus."""

import re
from itertools import combinations

import pytest
import yaml

from monitoring import SLA_S, models, on_call
from monitoring.panels import FOLDER, WIDTH, Panel, as_json, dashboard
from tests.monitoring import grafana
from tests.monitoring.names import exposed, matches, read_by, recorded
from tests.monitoring.prometheus import MONITORING

UNITS = {"s", "reqps", "cps", "percentunit", "short", "bytes"}  # of Grafana's names for them, those that we use
PANELS = [(board, panel) for board in grafana.DASHBOARDS for panel in board["panels"] if panel["type"] != "row"]
OF_TIME = ("$__rate_interval", "$__range")

each_dashboard = pytest.mark.parametrize("board", grafana.DASHBOARDS, ids=lambda board: board["uid"])
each_panel = pytest.mark.parametrize(
    ("board", "panel"), PANELS, ids=lambda x: f"{x['uid']}" if "uid" in x else x["title"]
)


def test_the_files_are_what_the_modules_make():
    made = {f"{d['uid']}.json": as_json(d) for d in (on_call.DASHBOARD, models.DASHBOARD)}
    assert {f.name: f.read_text() for f in FOLDER.iterdir()} == made, "run `python -m monitoring`"


@each_dashboard
def test_every_series_that_is_asked_for_is_exposed_or_recorded(board):
    series = exposed()
    asked = [q.expression for q in grafana.queries(board)]
    asked += [v["query"]["query"] for v in grafana.variables(board) if v["type"] == "query"]
    for name, matchers in (read for expression in asked for read in read_by(expression)):
        assert name in recorded() or any(matches(one, name, matchers) for one in series), (name, matchers)


@each_dashboard
def test_variables_are_declared_and_used(board):
    declared = {f"${v['name']}" for v in grafana.variables(board)}
    expressions = [q.expression for q in grafana.queries(board)]
    used = set(re.findall(r"\$\w+", " ".join(expressions)))
    assert used - set(OF_TIME) == declared
    for v in grafana.variables(board):
        if v["type"] == "query":
            assert grafana.LABEL_VALUES.fullmatch(v["query"]["query"])
            assert v["query"]["query"] == v["definition"]
        else:
            assert v["current"]["value"] in [option["value"] for option in v["options"]]


@each_dashboard
def test_ids_are_unique_and_no_panel_lies_on_another(board):
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    for p in (panel["gridPos"] for panel in panels):
        assert p["x"] >= 0
        assert p["x"] + p["w"] <= WIDTH
    for a, b in combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@each_panel
def test_a_panel_says_what_it_shows_in_which_unit_and_asks_by_letters(board, panel):
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == list("ABCDEFGHIJKL"[: len(letters)])
    assert letters
    assert all(target["instant"] != target["range"] for target in panel["targets"])


@each_panel
def test_what_shows_latency_changes_its_colour_at_the_sla(board, panel):
    asked = " ".join(target["expr"] for target in panel["targets"])
    if "histogram_quantile" in asked and "_seconds_bucket" in asked:
        assert SLA_S in [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]


@each_dashboard
def test_titles_tell_panels_apart_and_all_ask_the_chosen_source(board):
    panels = [p for p in board["panels"] if p["type"] != "row"]
    assert len({p["title"] for p in panels}) == len(panels)
    sources = [p["datasource"] for p in panels] + [t["datasource"] for p in panels for t in p["targets"]]
    sources += [a["datasource"] for a in board["annotations"]["list"]]
    assert {s["uid"] for s in sources} == {"${datasource}"}


def test_the_rows_of_the_latency_heat_map_are_round_numbers():
    edges = [labels["le"] for name, labels in exposed() if name == "winnow_request_seconds_bucket"]
    assert max(map(len, edges)) <= len("0.0025")


def test_each_dashboard_leads_to_the_others():
    for board in grafana.DASHBOARDS:
        (link,) = board["links"]
        assert link["keepTime"]
        assert all(set(link["tags"]) <= set(other["tags"]) for other in grafana.DASHBOARDS)


def test_the_waterfall_begins_each_stage_where_the_one_before_it_ends():
    starts, takes = on_call.STARTS, on_call.TAKES
    assert list(takes) == ["retrieval", "preranking", "reranking", "selection"]
    assert starts["retrieval"].startswith("0 * ")
    assert 'stage=~"retrieval|preranking|reranking"' in starts["selection"]
    assert 'stage=~"selection"' in takes["selection"]


def test_grafana_finds_prometheus_and_knows_how_often_it_scrapes():
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["uid"], source["type"], source["url"]) == ("prometheus", "prometheus", "http://prometheus:9090")
    scrape = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    for board in grafana.DASHBOARDS:
        (variable,) = [v for v in board["templating"]["list"] if v["type"] == "datasource"]
        assert variable["current"]["value"] == source["uid"]


def test_a_panel_that_no_longer_fits_begins_a_new_line():
    def panel(width: int, height: int) -> Panel:
        return Panel("stat", f"{width}", "", "s", [], width, height)

    placed = dashboard("u", "t", "", (), [("one", [panel(12, 4), panel(12, 9), panel(8, 4)]), ("two", [panel(24, 2)])])
    places = [tuple(p["gridPos"].values()) for p in placed["panels"]]
    assert places == [(0, 0, 24, 1), (0, 1, 12, 4), (12, 1, 12, 9), (0, 10, 8, 4), (0, 14, 24, 1), (0, 15, 24, 2)]


def test_a_panel_wider_than_the_grid_is_refused():
    with pytest.raises(ValueError, match="25 wide"):
        dashboard("u", "t", "", (), [("one", [Panel("stat", "x", "", "s", [], 25, 1)])])


def test_variables_are_filled_in_as_grafana_does():
    filled = grafana.filled_in('rate(x{a=~"$arm"}[$__rate_interval])[$__range:]', {"arm": "b"}, 60, 1)
    assert filled == 'rate(x{a=~"b"}[4s])[60s:]'
    assert grafana.regex(["b", "c.d"]) == r"(b|c\.d)"
    assert grafana.step_s(86_400, 1) == 86.4
