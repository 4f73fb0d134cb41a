"""PromQL that several panels share, over the instances that the dashboard's variables choose.

Everything is a string; `within` is a window: Grafana's $__rate_interval for what moves with the time shown,
$__range for one number over all of it.
"""

STAGES = ("retrieval", "preranking", "reranking", "selection")  # in their order, which no label has
NOW, SHOWN = "$__rate_interval", "$__range"
BUDGET = "scalar(slo:winnow_error_budget:ratio)"
CHOSEN = ('job="$job"', 'instance=~"$instance"')
ANSWERED = 'outcome=~"ok|degraded|empty"'


def of(metric: str, *matchers: str) -> str:
    """The metric of the chosen instances."""
    return f"{metric}{{{', '.join((*CHOSEN, *matchers))}}}"


def where(label: str, value: object) -> str:
    """A matcher: this label has this value."""
    return f'{label}="{value}"'


def rate(metric: str, *matchers: str, by: str = "", within: str = NOW) -> str:
    """Its rise a second, added up over everything but the labels of `by`."""
    return f"sum by ({by}) (rate({of(metric, *matchers)}[{within}]))"


def mean(histogram: str, *matchers: str, by: str = "", within: str = NOW) -> str:
    """The mean of what a histogram observed."""
    total, n = (rate(f"{histogram}_{part}", *matchers, by=by, within=within) for part in ("sum", "count"))
    return f"{total} / {n}"


def quantile(q: float | str, histogram: str, *matchers: str, by: str = "", within: str = NOW) -> str:
    """A quantile of what a histogram observed; NaN where it observed nothing."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', *matchers, by=labels, within=within)})"


def missed(window: str) -> str:
    """The recorded share of requests that missed the SLA."""
    return f'job:winnow_requests_missed:ratio_rate{window}{{job="$job"}}'


def in_order(expression_of: dict[str, str]) -> str:
    """One series a stage, whose label `step` sorts by the order of the funnel: "1 retrieval", "2 preranking", …"""
    return " or ".join(
        f'label_replace({expression}, "step", "{number} {stage}", "", "")'
        for number, (stage, expression) in enumerate(expression_of.items(), start=1)
    )


def by_generation(expression: str, *others: str) -> str:
    """What instances measured, summed by the generation that serves on each.

    others: labels that the expression has beside job and instance, to be kept.
    """
    serving = of("winnow_generation_info", 'role="serving"')
    kept = ", ".join(("digest", *others))
    return f"sum by ({kept}) ({expression} * on (job, instance) group_left (digest) {serving})"
