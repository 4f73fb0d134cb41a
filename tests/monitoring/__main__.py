"""python -m tests.monitoring: promtool's checks and cases, then every query of every dashboard on a real Prometheus
that scraped the real service while everything happened to it. Prints a table; exits with 1 and says what is wrong.

A query is wrong that Prometheus refuses, that has no series, or none with a number in it. `prometheus` and `promtool`
must be on the PATH; `make monitoring-test` sees to that.
"""

import contextlib
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loadtest.launch import Server, wait_for
from tests.monitoring import grafana, provoked
from tests.monitoring.grafana import Asked, Json
from tests.monitoring.prometheus import CASES, MONITORING, RULES, SCRAPE_S, Prometheus, promtool, scraping

PATIENCE_S = 60.0
# They begin without a "for", and so must fire within seconds of what was done.
MUST_FIRE = {"WinnowSLABurnsFast", "WinnowSLABurnsSlowly", "WinnowWorkersDie"}
MAY_BE_SLOW = {"WinnowSLABurnsFast", "WinnowSLABurnsSlowly"}  # on a machine that stalls, in calm as well


def main() -> int:
    """Returns the exit code."""
    began = time.monotonic()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as beside:
        folder = Path(name)
        cases = beside.submit(static)
        bundles = provoked.packed(folder)
        with provoked.started(bundles, folder / "service.log") as server:
            with scraping(server.admin_port, folder) as prometheus:
                wrong += provoke(server, prometheus, bundles)
                wrong += asked(prometheus, server)
            _, exposition = server.call("GET", "/metrics", is_admin=True)
            wrong += [why for why in [promtool("check", "metrics", given=exposition)] if why]
        wrong += cases.result()
    for why in wrong:
        print(f"WRONG {why}")
    print(f"{len(wrong)} wrong, in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def static() -> list[str]:
    """What promtool has against the files."""
    files = [("check", "config", MONITORING / "prometheus.yml"), ("check", "rules", *RULES)]
    cases = [("test", "rules", case) for case in CASES]
    return [why for why in (promtool(*arguments) for arguments in (*files, *cases)) if why]


def provoke(server: Server, prometheus: Prometheus, bundles: provoked.Bundles) -> list[str]:
    """Calm, then everything; what fires that shouldn't, and what doesn't that should."""
    provoked.calm(server)
    wrong = [f"in calm {alert} fires" for alert in sorted(prometheus.firing() - MAY_BE_SLOW)]
    provoked.everything(server, bundles)
    with contextlib.suppress(RuntimeError):
        wait_for(lambda: prometheus.firing() >= MUST_FIRE, PATIENCE_S, "the alerts")
    return wrong + [f"{alert} doesn't fire" for alert in sorted(MUST_FIRE - prometheus.firing())]


# -------------------------------------------------------------------------------------------- the queries


def asked(prometheus: Prometheus, server: Server) -> list[str]:
    """Print what each rule, variable and query gives; what gives nothing."""
    wrong = []
    print("| dashboard | what | query | series |\n|---|---|---|---|")
    seconds = time.time() - float(prometheus.now("process_start_time_seconds")[0]["value"][1])
    wrong += rules(prometheus)
    for dashboard in grafana.DASHBOARDS:
        chosen: dict[str, str] = {}
        for variable in grafana.variables(dashboard):
            values = values_of(prometheus, variable, chosen)
            wrong += say(Asked(dashboard["title"], f"variable: {variable['name']}", "", ""), len(values))
            several = grafana.regex(values) if values else ""
            chosen[variable["name"]] = several if variable["multi"] else variable["current"].get("value", several)
        for query in grafana.queries(dashboard):
            expression = grafana.filled_in(query.expression, chosen, seconds, SCRAPE_S)
            try:
                wrong += say(query, series(prometheus, expression, seconds, is_instant=query.is_instant))
            except RuntimeError as e:
                wrong.append(f"{query.dashboard}, {query.what} {query.ref}: {e}: {expression}")
    return wrong


def rules(prometheus: Prometheus) -> list[str]:
    """Those that Prometheus couldn't evaluate, and recording rules without a series."""
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    wrong = [f"rule {rule['name']}: {rule.get('lastError')}" for rule in found if rule["health"] != "ok"]
    for rule in found:
        if rule["type"] == "recording":
            wrong += say(Asked("rules", rule["name"], "", ""), numbers(prometheus.now(rule["name"])))
    return wrong


def values_of(prometheus: Prometheus, variable: Json, chosen: dict[str, str]) -> list[str]:
    """What a reader may choose."""
    if variable["type"] == "custom":
        return [option["value"] for option in variable["options"]]
    wanted = grafana.LABEL_VALUES.fullmatch(variable["query"]["query"])
    if not wanted:
        raise RuntimeError(f"variable {variable['name']}: {variable['query']['query']} is not label_values(…)")
    matching = grafana.filled_in(wanted["series"], chosen, 1, SCRAPE_S)
    return list(prometheus.get(f"label/{wanted['label']}/values", **{"match[]": matching}))


def series(prometheus: Prometheus, expression: str, seconds: float, *, is_instant: bool) -> int:
    """How many series with a number in them it gives. Raises RuntimeError."""
    if is_instant:
        return numbers(prometheus.now(expression))
    end = time.time()
    step_s = grafana.step_s(seconds, SCRAPE_S)
    found = prometheus.get("query_range", query=expression, start=end - seconds, end=end, step=step_s)
    return numbers(found["result"])


def numbers(result: Iterable[Json]) -> int:
    """The series that have at least one number."""
    points = (one.get("values") or [one["value"]] for one in result)
    return sum(any(math.isfinite(float(value)) for _, value in values) for values in points)


def say(query: Asked, n: int) -> list[str]:
    print(f"| {query.dashboard} | {query.what} | {query.ref} | {n} |")
    return [] if n else [f"{query.dashboard}, {query.what} {query.ref}: no series with a number"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    sys.exit(main())
