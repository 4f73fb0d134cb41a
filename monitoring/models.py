"""The dashboard of the owner of the models: what serves, how far candidates get, what scores look like, for whom.

Arms are a label of latency and scores; until there are experiments the only arm is "none". Roles are a label of what
is held; requests are served by one role alone, so what they met is shown by the digest of the generation that served.
Scores can be negative, and a histogram of such has no sum in Prometheus: there are quantiles of them and no means.
"""

from monitoring import OBJECTIVE, SLA_S
from monitoring.on_call import AT_SLA, COVERED
from monitoring.panels import Query, Variable, columns, dashboard, heat, lines, table
from monitoring.queries import SHOWN, STAGES, by_generation, in_order, mean, of, quantile, rate, where

EDGES = {"wanted": "wanted", "done": "done", "out": "passed on"}  # label → what it is called
SCORERS = STAGES[:3]
OF_ARM = 'arm=~"$arm"'
EACH = "job, instance"

VARIABLES = (
    Variable("job", "Service", "label_values(winnow_quality, job)"),
    Variable("instance", "Instance", 'label_values(winnow_quality{job="$job"}, instance)', is_multiple=True),
    Variable("arm", "Arm", 'label_values(winnow_score_count{job="$job"}, arm)', is_multiple=True),
    Variable("role", "Role", 'label_values(winnow_generation_info{job="$job"}, role)', is_multiple=True),
    Variable("stage", "Stage", SCORERS, chosen="reranking"),
    Variable("edge", "Edge", tuple(EDGES), chosen="done"),
)
OF_ROLE = 'role=~"$role"'


def mean_of_generation(histogram: str, *matchers: str) -> str:
    """The mean of what requests met, by the generation that serves where they were answered."""
    total, n = (by_generation(rate(f"{histogram}_{part}", *matchers, by=EACH)) for part in ("sum", "count"))
    return f"{total} / {n}"


def quantile_of_generation(q: float, histogram: str, *matchers: str) -> str:
    """A quantile of it, likewise."""
    buckets = rate(f"{histogram}_bucket", *matchers, by=f"{EACH}, le")
    return f"histogram_quantile({q}, {by_generation(buckets, 'le')})"


SERVED = (
    table(
        "Generations held",
        "Which bundle has which role on which instance; the digest's first 12 digits, as in an answer's generation.",
        of("winnow_generation_info", OF_ROLE),
        ("instance", "role", "digest"),
    ),
    lines(
        "Since a generation was loaded",
        "By role; a restart begins anew. A candidate that grows old was never made to serve.",
        "s",
        Query(of("winnow_generation_age_seconds", OF_ROLE), "{{instance}} {{role}}"),
        least=0,
    ),
    lines(
        "Instances by generation",
        "How many instances serve each generation: one line while nothing is being changed over.",
        "short",
        Query(f"count by (digest) ({of('winnow_generation_info', where('role', 'serving'))})", "{{digest}}"),
        least=0,
        is_stacked=True,
    ),
)

CANDIDATES = (
    columns(
        "Candidates per stage",
        "Of a mean request over the time shown: what a stage was configured for, what it worked on and what it passed "
        "on.",
        "short",
        *(
            (
                called,
                in_order(
                    {
                        s: mean("winnow_stage_candidates", where("stage", s), where("edge", edge), within=SHOWN)
                        for s in STAGES
                    }
                ),
            )
            for edge, called in EDGES.items()
        ),
    ),
    lines(
        "Width done",
        "Candidates that a stage worked on, on average. It falls with quality, and where time runs short.",
        "short",
        Query(mean("winnow_stage_candidates", where("edge", "done"), by="stage"), "{{stage}}"),
        least=0,
    ),
    lines(
        "Width done over wanted",
        "1 is the funnel as the bundle configures it. Retrieval is below it where filters leave fewer.",
        "percentunit",
        Query(
            f"{rate('winnow_stage_candidates_sum', where('edge', 'done'), by='stage')}"
            f" / {rate('winnow_stage_candidates_sum', where('edge', 'wanted'), by='stage')}",
            "{{stage}}",
        ),
        steps=COVERED,
        least=0,
    ),
    heat(
        "Candidates of the chosen stage and edge",
        "How many each request had, a row a bucket: two bands are two kinds of request.",
        "short",
        rate("winnow_stage_candidates_bucket", where("stage", "$stage"), where("edge", "$edge"), by="le"),
        width=24,
    ),
)

COVERAGE = (
    lines(
        "Coverage",
        "Share of the wanted candidates that the deep model saw: on average, and the share of answers under a half.",
        "percentunit",
        Query(mean("winnow_coverage_ratio"), "mean"),
        Query(
            f"{rate('winnow_coverage_ratio_bucket', where('le', 0.5))} / {rate('winnow_coverage_ratio_count')}",
            "answers under a half",
        ),
        steps=COVERED,
        least=0,
        most=1,
    ),
    heat(
        "Coverage of each answer",
        "A row a bucket; the uppermost are those that were fully re-ranked.",
        "percentunit",
        rate("winnow_coverage_ratio_bucket", by="le"),
        width=8,
    ),
    lines(
        "Degradations per request",
        "How often each departure happens: failed and late stages are faults, narrowed ones load or time.",
        "percentunit",
        Query(
            f"{rate('winnow_degradations_total', by='stage, reason')}"
            f" / on () group_left () {rate('winnow_stage_seconds_count', where('stage', 'selection'))}",
            "{{stage}}: {{reason}}",
        ),
        least=0,
    ),
)

SCORES = (
    heat(
        "Scores of the chosen stage and arms",
        "The first three scores of each answer that this stage made, a row a bucket. A change of shape without one of "
        "generation is a change of features or of traffic.",
        "short",
        rate("winnow_score_bucket", where("stage", "$stage"), OF_ARM, by="le"),
        width=16,
    ),
    lines(
        "Score quantiles of the chosen stage",
        "Of the first three scores of each answer.",
        "short",
        *(
            Query(quantile(q, "winnow_score", where("stage", "$stage"), OF_ARM), f"p{q * 100:g}")
            for q in (0.1, 0.5, 0.9)
        ),
    ),
    lines(
        "Median score by who made it",
        "All are on one scale: a stage that is far off the others has a calibration that no longer fits.",
        "short",
        Query(quantile(0.5, "winnow_score", OF_ARM, by="stage"), "{{stage}}"),
    ),
    lines(
        "Who scored the head of the answer",
        "Share of the first three items by the stage that scored them. Re-ranking should be nearly all.",
        "percentunit",
        Query(
            f"{rate('winnow_score_count', OF_ARM, by='stage')}"
            f" / on () group_left () {rate('winnow_score_count', OF_ARM)}",
            "{{stage}}",
        ),
        least=0,
        most=1,
        is_stacked=True,
    ),
)

ARMS = (
    lines(
        "Answers by arm",
        "Answers a second on each side of the experiment; before there are any, all are on the arm none.",
        "reqps",
        Query(rate("winnow_request_seconds_count", OF_ARM, by="arm"), "{{arm}}"),
        least=0,
        width=6,
    ),
    lines(
        "Latency by arm, 99th percentile",
        "An arm whose model is slower shows here first. The line is the SLA.",
        "s",
        Query(quantile(0.99, "winnow_request_seconds", OF_ARM, by="arm"), "{{arm}}"),
        steps=AT_SLA,
        least=0,
        width=6,
    ),
    lines(
        "In time, by arm",
        "Share of an arm's answers that came within the SLA. The line is the objective.",
        "percentunit",
        Query(
            f"{rate('winnow_request_seconds_bucket', where('le', SLA_S), OF_ARM, by='arm')}"
            f" / {rate('winnow_request_seconds_count', OF_ARM, by='arm')}",
            "{{arm}}",
        ),
        steps=((None, "red"), (OBJECTIVE, "green")),
        most=1,
        width=6,
    ),
    lines(
        "Median score by arm, chosen stage",
        "Of the first three scores of each answer.",
        "short",
        Query(quantile(0.5, "winnow_score", where("stage", "$stage"), OF_ARM, by="arm"), "{{arm}}"),
        width=6,
    ),
)

BY_GENERATION = (
    lines(
        "Median score by generation, chosen stage",
        "By the generation that serves on each instance. In the interval of a change both have a part.",
        "short",
        Query(quantile_of_generation(0.5, "winnow_score", where("stage", "$stage"), OF_ARM), "{{digest}}"),
    ),
    lines(
        "Coverage by generation",
        "A heavier model is covered less under the same load.",
        "percentunit",
        Query(mean_of_generation("winnow_coverage_ratio"), "{{digest}}"),
        steps=COVERED,
        least=0,
        most=1,
    ),
    lines(
        "Latency by generation, 99th percentile",
        "By the generation that serves on each instance. The line is the SLA.",
        "s",
        Query(quantile_of_generation(0.99, "winnow_request_seconds"), "{{digest}}"),
        steps=AT_SLA,
        least=0,
    ),
)

DASHBOARD = dashboard(
    "winnow-models",
    "Winnow: models",
    "What serves, how many candidates get how far, what the deep model sees of them, and what scores look like.",
    VARIABLES,
    (
        ("What is served", SERVED),
        ("Candidates", CANDIDATES),
        ("Coverage and degradation", COVERAGE),
        ("Scores", SCORES),
        ("By arm", ARMS),
        ("By generation", BY_GENERATION),
    ),
)
