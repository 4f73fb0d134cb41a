"""A plan in words: what it takes, what it will do, and where each number comes from. Text out; nothing is decided."""

from collections.abc import Iterator, Mapping, Sequence

from loadtest.plan.calibration import SIZES, Calibration
from loadtest.plan.classic import Sum
from loadtest.plan.costs import Line
from loadtest.plan.memory import GIB, KINDS, index_bytes, kind_for
from loadtest.plan.planning import Interval, Plan, Question, growth_of
from loadtest.plan.recipe import FAN_OUT_S
from loadtest.plan.widths import Choice

ENDLESS_S = 2.0  # a p99 beyond it means a queue that grows
TYPICAL_D = 64  # dimensions assumed of a catalogue that is only a number


def plan_lines(calibration: Calibration, question: Question, plan: Plan, memory_bytes: float) -> Iterator[str]:
    """What the plan is, and then how far to trust it."""
    c, qps = plan.configuration, question.qps
    yield asked(question)
    if calibration.doubt:
        yield f"DO NOT TRUST IT: {calibration.doubt}; calibrate again on a machine that has nothing else to do"
    yield ""
    if plan.machines:
        tried = ", ".join(f"{w}: {r:.0f}/s" for w, r in plan.by_workers.items())
        yield _row("machines", f"{plan.machines} of {question.cores} cores")
        yield _row("workers a machine", f"{c.workers}   ({tried})")
        yield _row("a request", "re-ranked by all workers" if plan.is_shared else "one worker takes it its whole way")
        yield _row("memory a machine", f"{memory_bytes / GIB:.1f} GiB")
        yield _row("highest rate", f"{_interval(plan.rate)} a second on one machine, at full quality")
        met = f"p50 {_ms(plan.p50_s)}, p99 {_ms(plan.p99_s)}, cores busy {plan.busy:.0%}"
        yield _row(f"at {qps / plan.machines:,.0f}/s each", met)
        yield _row("headroom", "; ".join(f"{name} {share:+.0%}" for name, share in plan.headroom.items()))
        if plan.per_million is not None:
            yield _row("a million requests", f"{plan.per_million:.3g} at {question.price:g} a core-hour")
    else:
        yield f"no rate keeps the full funnel in time on {question.cores} cores: one request alone is too slow"
    yield _row("CPU of a request", ", ".join(f"{who} {s * 1e3:.2f} ms" for who, s in plan.stage_s.items() if s))
    yield ""
    yield from _provenance(calibration, question, plan)


def asked(question: Question) -> str:
    """The question in words."""
    of = f"{question.qps:,.0f} requests a second, p99 <= {question.p99_s * 1e3:g} ms, {question.items:,} items"
    return f"{of}, widths {question.retrieve} -> {question.rerank}"


def of_load(calibration: Calibration) -> str:
    """What was fitted on the runs under load, in words."""
    (cold, more), busiest = calibration.warmth, calibration.busiest
    hot = f"{cold + more * busiest:.2f} x on cores that are {busiest:.0%} busy"
    takes = f"a request's CPU is {cold:.2f} x that of one at a time on idle cores and {hot}"
    if calibration.lone != 1.0:
        takes += f", {calibration.lone:.2f} x that with one worker"
    waits = f"who wakes on busy cores waits about {calibration.wake_s * 1e3:.1f} ms"
    beyond = f"{calibration.beyond_s * 1e3:.1f} ms of every latency are nobody's"
    return f"{takes}, {waits}, {beyond}, over the median latencies are {calibration.stretch:.2f} x the simulated"


def _provenance(calibration: Calibration, question: Question, plan: Plan) -> Iterator[str]:
    """Which numbers were measured here, which fitted, simulated, extrapolated."""
    where = f"{calibration.date}, {calibration.machine}: {calibration.bundle}, {calibration.base} (a narrower copy)"
    yield _row("measured", where)
    runs = f"the simulation is off by {calibration.error:.0%} on {calibration.n_fitted} runs"
    yield _row(
        "fitted",
        f"{of_load(calibration)}; {runs}" if calibration.n_fitted else "nothing: no run under load could be used",
    )
    if plan.is_shared:
        assumed = f"the event loop takes {FAN_OUT_S * 1e3:.2f} ms a shard; the calibration shared no request"
        yield _row("assumed", assumed)
    yield _row("simulated", "all rates and latencies, without the network and a load generator; the intervals are")
    yield _row("", "the speeds this machine had during the calibration, and two seeds")
    if plan.machines > 1:
        yield _row("never measured", f"{plan.machines} machines: one is simulated, requests are spread at random")
    if question.cores != calibration.cores:
        yield _row(
            "extrapolated", f"{question.cores} cores from {calibration.cores}: as slow when as busy as those were"
        )
    if question.items != calibration.items:
        grows = growth_of(calibration)
        likely, low, high = grows.growth(question.items / calibration.items)
        yield _row("extrapolated", f"retrieval at {question.items:,} items from {calibration.items:,}, with the power")
        yield _row("", f"{grows}: {likely:.3g} times ({low:.3g} to {high:.3g})")
        if calibration.kind != (kind := kind_for(question.items, question.retrieve)):
            yield _row("", f"its index would be {kind}, and {calibration.kind} was measured")
    yield ""
    yield from cost_lines(calibration)
    yield from memory_lines(calibration, question.items)
    if calibration.exponents:
        yield from complexity_lines(calibration)
    else:
        yield _row("not measured", "how cost grows with catalogue and model; `plan --complexity` does it")


def cost_lines(calibration: Calibration) -> Iterator[str]:
    """What was measured of the stages, as lines over their widths."""
    d = calibration.demand
    others = f"who asks, selection, reading and packing {d.users_s * 1e3:.2f} ms"
    yield _row("costs", f"event loop {d.loop_s * 1e3:.2f} ms; {others}")
    found, scored = _line(d.retrieval, "candidate"), _line(d.preranking, "candidate")
    yield _row("", f"retrieval {found}; pre-ranking {scored}")
    waits = f"without CPU, to a worker and back, {d.trip_s * 1e3:.2f} ms"
    yield _row("", f"re-ranking {_line(d.shard, 'row')}; {waits}")


def memory_lines(calibration: Calibration, items: int) -> Iterator[str]:
    """Bytes an item of each kind of index at this catalogue."""
    kinds = (f"{kind} {index_bytes(kind, items, calibration.d) / items:.1f}" for kind in KINDS)
    yield _row("index, bytes an item", ", ".join(kinds))


def _line(of: Line, each: str) -> str:
    return f"{of.fixed * 1e3:.2f} ms + {of.each * 1e6:.2f} us a {each}"


def _row(head: str, said: str) -> str:
    return f"{head:<20}  {said}"


def complexity_lines(calibration: Calibration) -> Iterator[str]:
    """Cost of a stage ~ items^a · width^b · dimension^c · model^d · workers^e, with intervals of 90 %."""
    yield "cost as a power of".ljust(20) + "".join(size.ljust(23) for size in SIZES).rstrip()
    for stage, sizes in calibration.exponents.items():
        yield f"  {stage}".ljust(20) + "".join(str(sizes.get(size, "-")).ljust(23) for size in SIZES).rstrip()


def choice_lines(choice: Choice, whole_s: float, floor: float) -> Iterator[str]:
    yield (
        f"cheapest widths that keep {floor:.1%} of NDCG: {choice.retrieve} -> {choice.rerank}, expected loss "
        f"{choice.loss:.2%}, {choice.cpu_s / whole_s:.0%} of the CPU of the full widths"
    )
    yield "(by the bundle's own table of losses; `python -m models rewidth` makes a bundle with them to try)"
    yield ""


def classic_lines(
    classic: Sum, shards: Sequence[int], items: int | None, found: Mapping[int, tuple[int, Interval, Interval] | str]
) -> Iterator[str]:
    """found: of each number of shards, workers, p50 and p99 at the rate asked for; or why there are none."""
    yield f"{classic.documents:,} documents at {classic.document_s * 1e3:g} ms each, by hand: nothing here was measured"
    yield ""
    yield "shards  a lone request   workers for the rate   p50, p99 by simulation"
    for n in shards:
        row, met = f"{n:6d}  {classic.alone_s(n) * 1e3:11,.1f} ms", found[n]
        if isinstance(met, str):
            yield f"{row}        none: {met}"
        else:
            yield f"{row}{met[0]:18,}       {_ms(met[1])}, {_ms(met[2])}"
    if items:
        alone_h = items * classic.document_s / 3600
        kind = kind_for(items, classic.documents)
        size = index_bytes(kind, items, TYPICAL_D) / GIB
        yield ""
        yield f"all {items:,} documents would take {alone_h:,.1f} h: a funnel finds the {classic.documents:,} first"
        yield f"an index of that size is {kind}: {size:,.1f} GiB at {TYPICAL_D} dimensions, by formula, without tables"
        yield "what finding them costs: `plan --items …` with a calibration"


def _interval(of: Interval) -> str:
    return f"{of.likely:,.0f} ({of.low:,.0f} to {of.high:,.0f})"


def _ms(of: Interval) -> str:
    def one(s: float) -> str:
        return f"{s * 1e3:,.1f}" if s < ENDLESS_S else "endless"

    return f"{one(of.likely)} ms ({one(of.low)} to {one(of.high)})"
