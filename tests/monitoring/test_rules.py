"""What can be said of the rules without Prometheus: they read what is there, and each alert is written up and tried."""

import re
from collections import defaultdict

import pytest
import yaml

from app.settings import Settings
from loadtest.launch import ROOT
from monitoring import OBJECTIVE, SLA_S
from tests.monitoring import grafana
from tests.monitoring.names import exposed, matches, read_by, recorded, rules
from tests.monitoring.prometheus import CASES, MONITORING

ALERTS = [rule for rule in rules() if "alert" in rule]
GUIDE = ROOT / "docs" / "monitoring.md"


def identity(alert: dict) -> str:
    return f"{alert['alert']} {alert['labels'].get('window', '')}".strip()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or identity(rule))
def test_every_series_that_a_rule_reads_is_exposed_or_recorded(rule):
    series = exposed()
    for name, matchers in read_by(rule["expr"]):
        assert name in recorded() or any(matches(one, name, matchers) for one in series), (name, matchers)


def test_recorded_names_are_level_metric_operations():
    for name in recorded():
        assert re.fullmatch(r"(slo|job|instance):winnow_\w+:(sum|ratio|ratio_rate\d+[mhd]|mean\d+[mhd])", name), name


def test_the_slo_is_the_same_in_rules_and_dashboards_and_its_sla_the_services_default():
    (budget,) = [r["expr"] for r in rules() if r.get("record") == "slo:winnow_error_budget:ratio"]
    assert budget == f"vector(1 - {OBJECTIVE})"
    assert re.findall(r'\ble="([^"]*)"', " ".join(r["expr"] for r in rules())) == [str(SLA_S)]
    assert Settings().sla_ms == SLA_S * 1e3


@pytest.mark.parametrize("alert", ALERTS, ids=identity)
def test_an_alert_says_what_how_bad_and_where_it_is_written_up(alert):
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]
    assert alert["annotations"]["runbook_url"] == f"docs/monitoring.md#{alert['alert'].lower()}"


def test_there_is_a_section_for_each_alert_and_for_no_other():
    sections = re.findall(r"^### (Winnow\w+)$", GUIDE.read_text(), re.MULTILINE)
    assert sections == list(dict.fromkeys(alert["alert"] for alert in ALERTS))


def test_the_sections_send_nobody_to_a_panel_that_is_not_there():
    _, _, sections = GUIDE.read_text().partition("\n## Alerts\n")
    named = set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", sections))
    titles = [panel["title"] for board in grafana.DASHBOARDS for panel in board["panels"]]
    assert named
    assert not [name for name in named if not any(title.startswith(name) for title in titles)]


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    fires: dict[str, set[bool]] = defaultdict(set)
    for file in CASES:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for expected in case["alert_rule_test"]:
                told = [f"{expected['alertname']} {a['exp_labels'].get('window', '')}" for a in expected["exp_alerts"]]
                of_its_name = [identity(a) for a in ALERTS if a["alert"] == expected["alertname"]]
                assert of_its_name, expected["alertname"]
                for name in of_its_name:
                    fires[name].add(name in map(str.strip, told))
    assert fires == {identity(alert): {True, False} for alert in ALERTS}


def test_prometheus_scrapes_the_admin_port_of_the_service_by_its_name():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"winnow:{Settings().admin_port}"]}]
    assert re.fullmatch("winnow.*", job["job_name"])
