"""The dashboard of the person on call: is the SLA met, what is wrong, where the time goes, what gives way.

From the top: one line that says whether to worry, the SLO, requests, the funnel's stages, and then what can be short:
permits, workers, generations. docs/monitoring.md has a section for each alert that names the panels to look at. It is
over 250 lines because it is the dashboard itself, panel after panel in reading order.
"""

from monitoring import OBJECTIVE, SLA_S
from monitoring.panels import (
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    Query,
    Variable,
    bars,
    columns,
    dashboard,
    heat,
    lines,
    number,
    table,
)
from monitoring.queries import BUDGET, NOW, SHOWN, STAGES, in_order, mean, missed, of, quantile, rate, where

AT_SLA = ((None, GREEN), (SLA_S, RED))
IN_SLA = ((None, RED), (OBJECTIVE, GREEN))
BURN = ((None, GREEN), (1, YELLOW), (6, ORANGE), (14.4, RED))
COVERED = ((None, RED), (0.8, GREEN))  # as the alert WinnowCoverageLow
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
RECENT = "5m"

VARIABLES = (
    Variable("job", "Service", "label_values(winnow_quality, job)"),
    Variable("instance", "Instance", 'label_values(winnow_quality{job="$job"}, instance)', is_multiple=True),
    Variable("quantile", "Quantile", ("0.5", "0.9", "0.99", "0.999"), chosen="0.99"),
)

ANSWERS, ANSWERS_NOW = (rate("winnow_request_seconds_count", within=within) for within in (SHOWN, NOW))


def took(*stages: str) -> str:
    """Seconds that these stages take of a request, on average over the time shown."""
    among = f'stage=~"{"|".join(stages)}"'
    return f"{rate('winnow_stage_seconds_sum', among, within=SHOWN)} / {ANSWERS}"


TAKES = {stage: took(stage) for stage in STAGES}
STARTS = {stage: took(*STAGES[:place]) if place else f"0 * {ANSWERS}" for place, stage in enumerate(STAGES)}

GLANCE = (
    number(
        "Within the SLA, 5 min",
        "Share of the requests of the last 5 minutes that were answered within the SLA. Clients' mistakes don't count.",
        "percentunit",
        f"1 - {missed('5m')}",
        IN_SLA,
    ),
    number(
        "Error budget left, 30 days",
        "What is left of the 1 % of requests that may miss the SLA in 30 days; below 0 the SLO is missed.",
        "percentunit",
        f"1 - {missed('30d')} / {BUDGET}",
        ((None, RED), (0, ORANGE), (0.25, GREEN)),
    ),
    number(
        "Burn rate, 1 h",
        "How many times too fast the budget was spent in the last hour: at 1 it lasts for 30 days, at 14.4 for two.",
        "short",
        f"{missed('1h')} / {BUDGET}",
        BURN,
    ),
    number(
        "Requests",
        "Ranking requests a second, whatever became of them.",
        "reqps",
        rate("winnow_requests_total", within=RECENT),
        ((None, "blue"),),
        decimals=1,
    ),
    number(
        "Latency, 99th percentile",
        "Of the answers of the last 5 minutes, from the first header byte. Red from the SLA on.",
        "s",
        quantile(0.99, "winnow_request_seconds", within=RECENT),
        AT_SLA,
        decimals=1,
    ),
    number(
        "Instances up",
        "Instances whose admin port could be scraped just now.",
        "short",
        'sum(up{job="$job"})',
        ((None, RED), (1, GREEN)),
        decimals=0,
    ),
    table(
        "Alerts",
        "What fires now; no data is no alert. Each has a section in docs/monitoring.md.",
        'ALERTS{alertname=~"Winnow.*", alertstate="firing"}',
        ("alertname", "severity", "instance", "window"),
        width=24,
        height=5,
    ),
)

SERVICE_LEVEL = (
    lines(
        "Share within the SLA",
        "Answered within the SLA, of all requests but clients' mistakes. The line is the objective.",
        "percentunit",
        *(Query(f"1 - {missed(window)}", window) for window in ("5m", "1h", "6h")),
        steps=IN_SLA,
        most=1,
        width=12,
    ),
    lines(
        "Burn rate by window",
        "Budget spent over budget earned. Pages: 14.4 in 1 h and 5 min, 6 in 6 h and 30 min. Tickets: 3 in 1 d and "
        "2 h, 1 in 3 d and 6 h.",
        "short",
        *(Query(f"{missed(window)} / {BUDGET}", window) for window in WINDOWS),
        steps=BURN,
        least=0,
        width=12,
    ),
)

REQUESTS = (
    lines(
        "Requests by outcome",
        "degraded: answered by a narrower or shorter funnel. empty: nothing to rank. refused: 503. deadline: 504 to a "
        "strict request. error: a defect, 500.",
        "reqps",
        Query(rate("winnow_requests_total", by="outcome"), "{{outcome}}"),
        least=0,
        is_stacked=True,
    ),
    lines(
        "Errors by cause",
        "Requests that missed the SLA, by why; and clients' mistakes (4xx), which don't count. late: answered, but "
        "after the SLA.",
        "reqps",
        Query(
            rate("winnow_requests_total", 'outcome=~"refused|deadline|error|client_error"', by="outcome"), "{{outcome}}"
        ),
        Query(rate("instance:winnow_requests_late:sum"), "late"),
        least=0,
    ),
    lines(
        "Latency percentiles",
        "Of all answers, over the chosen instances. The line is the SLA.",
        "s",
        *(Query(quantile(q, "winnow_request_seconds"), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        steps=AT_SLA,
        least=0,
    ),
    heat(
        "Latency",
        "Answers by their time, a row a bucket; the row that ends at the SLA is the last that counts as in time.",
        "s",
        rate("winnow_request_seconds_bucket", by="le"),
        width=16,
    ),
    lines(
        "Latency by instance, chosen quantile",
        "One line far above the others is one bad machine; all together is load or a bundle.",
        "s",
        Query(quantile("$quantile", "winnow_request_seconds", by="instance"), "{{instance}}"),
        steps=AT_SLA,
        least=0,
    ),
)

FUNNEL = (
    columns(
        "Waterfall of a request",
        "Where the time of a mean request goes, over the time shown: each stage begins where the one before it ends.",
        "s",
        ("starts", in_order(STARTS)),
        ("takes", in_order(TAKES)),
        hidden="starts",
    ),
    bars(
        "Stages at the 99th percentile",
        "The slow requests' time by stage, in the funnel's order, over the time shown. Red from the SLA on.",
        "s",
        *(Query(quantile(0.99, "winnow_stage_seconds", where("stage", s), within=SHOWN), s) for s in STAGES),
        steps=AT_SLA,
    ),
    lines(
        "Stages, chosen quantile",
        "Each stage's time by itself. What is left of a request's time is the event loop and the wait for a worker.",
        "s",
        *(Query(quantile("$quantile", "winnow_stage_seconds", where("stage", s)), s) for s in STAGES),
        steps=AT_SLA,
        least=0,
    ),
    lines(
        "Mean request by stage",
        "The waterfall over time: the stages on each other, and on top what is outside of them (who asks, parsing, "
        "waiting, the answer).",
        "s",
        *(Query(f"{rate('winnow_stage_seconds_sum', where('stage', s))} / {ANSWERS_NOW}", s) for s in STAGES),
        Query(
            f"({rate('winnow_request_seconds_sum')} - {rate('winnow_stage_seconds_sum')}) / {ANSWERS_NOW}", "outside"
        ),
        least=0,
        is_stacked=True,
    ),
    lines(
        "Coverage",
        "Share of the wanted candidates that the deep model saw: on average, and the share of answers that were fully "
        "re-ranked. The line is that of the alert.",
        "percentunit",
        Query(mean("winnow_coverage_ratio"), "mean"),
        Query(
            f"1 - {rate('winnow_coverage_ratio_bucket', where('le', 0.99))} / {rate('winnow_coverage_ratio_count')}",
            "fully covered answers",
        ),
        steps=COVERED,
        least=0,
        most=1,
    ),
    lines(
        "Degradations",
        "Departures from the full funnel: stage and reason. One answer can have several.",
        "reqps",
        Query(rate("winnow_degradations_total", by="stage, reason"), "{{stage}}: {{reason}}"),
        least=0,
        is_stacked=True,
    ),
)

CAPACITY = (
    lines(
        "Quality",
        "The share of its configured width that the funnel runs at: it falls before anybody is refused, down to 0.3. "
        "The line is that of the alert.",
        "percentunit",
        Query(of("winnow_quality"), "{{instance}}"),
        steps=((None, RED), (0.7, GREEN)),
        least=0,
        most=1,
    ),
    lines(
        "Admission",
        "Requests that hold a permit, and permits there are. At quality's floor normal requests are refused from 90 % "
        "of them on, low ones from half.",
        "short",
        Query(of("winnow_inflight"), "{{instance}} in flight"),
        Query(of("winnow_admission_limit"), "{{instance}} permits"),
        least=0,
    ),
    lines(
        "Refused",
        "Share of the requests that got no permit: 503 with Retry-After.",
        "percentunit",
        Query(
            f"{rate('winnow_requests_total', where('outcome', 'refused'))} / {rate('winnow_requests_total')}", "refused"
        ),
        steps=((None, GREEN), (1 - OBJECTIVE, RED)),
        least=0,
    ),
    lines(
        "CPU of the service's process",
        "Cores that the event loop uses, and those that the workers do, who run the funnel.",
        "short",
        Query(rate("process_cpu_seconds_total", by="instance"), "{{instance}}"),
        Query(rate("winnow_worker_cpu_seconds_total", by="instance"), "workers of {{instance}}"),
        least=0,
    ),
    lines(
        "Memory",
        "Resident memory of the service's process and of each worker; item tables are mapped and counted in each.",
        "bytes",
        Query(of("process_resident_memory_bytes"), "{{instance}} service"),
        Query(of("winnow_worker_rss_bytes"), "{{instance}} worker {{worker}}"),
        least=0,
    ),
)

WORKERS = (
    lines(
        "Workers by state",
        "Of the generation that serves, spares among them. None alive means pre-rank scores for everybody, and a "
        "/readyz of 503.",
        "short",
        Query(f"sum by (state) ({of('winnow_workers')})", "{{state}}"),
        least=0,
        is_stacked=True,
    ),
    lines(
        "Workers replaced",
        "Workers that ended, by themselves or because they hung, within the interval.",
        "short",
        Query(f"sum by (instance) (increase({of('winnow_worker_restarts_total')}[{NOW}]))", "{{instance}}"),
        least=0,
    ),
    lines(
        "Shards by outcome",
        "A request that isn't shared is one shard. late: the deadline came while it was being scored. expired: before "
        "that. lost: its worker ended. failed: the model did.",
        "cps",
        Query(rate("winnow_shards_total", by="outcome"), "{{outcome}}"),
        least=0,
        is_stacked=True,
    ),
    lines(
        "Time of a shard in the model",
        "Without the wait for a worker. It rises when a core is lost or a bundle's model is larger.",
        "s",
        *(Query(quantile(q, "winnow_shard_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        steps=AT_SLA,
        least=0,
    ),
    lines(
        "Work done twice",
        "Rows sent again over rows sent, as hedges of late shards (5 % at most, the line) and after a death.",
        "percentunit",
        *(
            Query(
                f"{rate('winnow_rows_total', where('work', w))} / {rate('winnow_rows_total', where('work', 'first'))}",
                w,
            )
            for w in ("hedge", "resend")
        ),
        steps=((None, GREEN), (0.05, RED)),
        least=0,
    ),
)

GENERATIONS = (
    table(
        "Generations held",
        "Which bundle has which role on which instance; the digest's first 12 digits, as in an answer's generation.",
        of("winnow_generation_info"),
        ("instance", "role", "digest"),
        width=8,
    ),
    lines(
        "Since a generation was loaded",
        "By role; a restart begins anew. What falls to 0 is a new one, or another one that got the role.",
        "s",
        Query(of("winnow_generation_age_seconds"), "{{instance}} {{role}}"),
        least=0,
        width=8,
    ),
    lines(
        "Items added and removed live",
        "Since the generation was loaded, by role. Instances that differ were sent different changes: each needs its "
        "own POST /admin/items.",
        "short",
        Query(of("winnow_generation_epoch"), "{{instance}} {{role}}"),
        least=0,
        width=8,
    ),
)

DASHBOARD = dashboard(
    "winnow-on-call",
    "Winnow: on call",
    "Is the SLA met, and if not, why: requests, the funnel's stages, degradation, permits, workers, generations.",
    VARIABLES,
    (
        ("At a glance", GLANCE),
        ("Service level", SERVICE_LEVEL),
        ("Requests", REQUESTS),
        ("Funnel", FUNNEL),
        ("Capacity", CAPACITY),
        ("Workers", WORKERS),
        ("Generations", GENERATIONS),
    ),
)
