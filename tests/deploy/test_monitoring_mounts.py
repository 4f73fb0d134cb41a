"""What monitoring/ says of addresses and paths holds among the services of docker-compose.yml."""

from pathlib import Path
from typing import Any

import yaml

from tests.deploy.manifests import ROOT, SETTINGS

SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
ADMIN_PORT = SETTINGS["WINNOW_ADMIN_PORT"].default
GRAFANA = ROOT / "monitoring/grafana/provisioning"


def mounted(service: str) -> dict[str, str]:
    """Target → source of what is mounted from monitoring/."""
    bound = [volume for volume in SERVICES[service]["volumes"] if not isinstance(volume, str)]
    return {volume["target"]: volume["source"] for volume in bound}


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def test_what_is_mounted_is_there():
    sources = [source for service in ("prometheus", "grafana") for source in mounted(service).values()]
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_prometheus_finds_its_rules_and_the_admin_port():
    configuration = read(ROOT / "monitoring/prometheus.yml")
    folders = {str((Path("/etc/prometheus") / pattern).parent) for pattern in configuration["rule_files"]}
    assert folders <= set(mounted("prometheus"))
    given = [group for job in configuration["scrape_configs"] for group in job["static_configs"]]
    assert [target for group in given for target in group["targets"]] == [f"winnow:{ADMIN_PORT}"]
    assert "winnow" in SERVICES


def test_grafana_finds_its_dashboards_and_prometheus():
    (provider,) = read(next((GRAFANA / "dashboards").glob("*.yml")))["providers"]
    assert mounted("grafana")[provider["options"]["path"]] == "./monitoring/grafana/dashboards"
    (source,) = read(next((GRAFANA / "datasources").glob("*.yml")))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
