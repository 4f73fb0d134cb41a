"""promtool, and a Prometheus of our own on a loopback port, with monitoring/'s configuration at a quicker pace."""

import contextlib
import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtest.launch import ROOT, free_port, stop, wait_for

MONITORING = ROOT / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))
CASES = sorted((ROOT / "tests" / "monitoring" / "rules").glob("*.yml"))
SCRAPE_S = 1.0
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """What the API answers. Raises RuntimeError with what Prometheus says is wrong."""
        asked = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(e.read().decode()) from e

    def now(self, expression: str) -> list[Any]:
        """The series of an instant query."""
        return list(self.get("query", query=expression)["result"])

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        return {series["metric"]["alertname"] for series in self.now('ALERTS{alertstate="firing"}')}


@contextlib.contextmanager
def scraping(port: int, folder: Path) -> Iterator[Prometheus]:
    """Prometheus on our rules, with the service on this admin port as its target; ready, and with a first scrape."""
    config = derived(port, folder)
    ours = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{ours}"])
    prometheus = Prometheus(f"http://127.0.0.1:{ours}")

    def has_scraped() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"prometheus ended with {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, RuntimeError):  # it is still starting
            return bool(prometheus.now('up{job="winnow"} == 1'))
        return False

    try:
        wait_for(has_scraped, PATIENCE_S, "Prometheus' first scrape")
        yield prometheus
    finally:
        stop(process)


def derived(port: int, folder: Path) -> Path:
    """monitoring/'s configuration for this target, every interval a second; returns its path."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], f"{SCRAPE_S:.0f}s")
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    for file in RULES:
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        written = folder / "rules" / file.name
        written.parent.mkdir(exist_ok=True)
        written.write_text(yaml.safe_dump(rules, sort_keys=False))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "prometheus.yml"


def promtool(*arguments: object, given: bytes = b"") -> str:
    """Why promtool objects, "" if it doesn't."""
    done = subprocess.run(["promtool", *map(str, arguments)], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode().strip()
    return f"promtool {arguments[0]} {arguments[1]}: {said}" if done.returncode else ""
