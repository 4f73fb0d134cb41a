"""The command line of `python -m loadtest plan`: calibrate, ask, vary one parameter and draw it."""

import argparse
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loadtest.lab.bodies import for_bundle
from loadtest.lab.options import number
from loadtest.plan import bundles, calibration, classic, complexity, measure, memory, planning, report, widths
from loadtest.plan.calibration import Calibration, CalibrationError, check_is_of
from loadtest.plan.planning import Question
from loadtest.plan.what_if import VARIED, varied, what_if

BUNDLE, CALIBRATION, PICTURE = Path("models/bundles/w1"), Path("reports/calibration.json"), Path("reports/plan.html")
GROWTH = "complexity.html"  # beside the calibration
MADE_BY = "python -m models synthesize makes models/bundles/w1 with its requests in five minutes"
NARROW = 4  # a calibration serves a quarter of the bundle's widths, since requests can only widen them
NONE = (planning.Interval(float("nan"), float("nan"), float("nan")),) * 2  # p50 and p99 where there are none
BY_HAND, BOTH = ("shards", "documents", "doc-ms"), ("qps",)  # of what may be varied
# Options of one kind of plan only
FOR_HAND = ("documents", "shards", "fan_out_ms")
CALIBRATED = (
    "retrieve", "rerank", "quality_floor", "cores", "workers", "price", "bundle", "requests", "calibrate",
    "complexity", "quick",
)  # fmt: skip
DOCUMENTS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--qps", type=number(0, is_open=True), default=100.0, help="requests a second, of all machines")
    parser.add_argument("--p99", type=seconds, default=0.1, help="the SLA: 100ms, 0.1s, or a number of milliseconds")
    parser.add_argument("--items", type=whole, help="of the catalogue: 1_000_000, 100e6; the calibration's if absent")
    parser.add_argument("--retrieve", type=whole, help="width of retrieval; the bundle's if absent")
    parser.add_argument("--rerank", type=whole, help="width of re-ranking; the bundle's if absent")
    parser.add_argument(
        "--quality-floor", type=number(0, 1), help="of NDCG, such as 0.98: the cheapest widths that keep it"
    )
    parser.add_argument("--cores", type=whole, help="of a machine; the calibration's if absent")
    parser.add_argument("--workers", type=whole, help="of a machine; if absent, what gives the highest rate")
    parser.add_argument("--price", type=number(0), help="of a core-hour, in any currency")
    parser.add_argument("--what-if", type=varied, metavar="PARAM=A..B", help=f"vary one of {', '.join(VARIED)}")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where --what-if draws")
    what = f"what is served: its widths, losses and sizes; the calibration's, or {BUNDLE} to calibrate, if absent"
    parser.add_argument("--bundle", type=Path, help=what)
    what = "to calibrate with, JSON, one a line; BUNDLE.requests.jsonl, or made up from its users, if absent"
    parser.add_argument("--requests", type=Path, help=what)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="where it is kept")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first: three to five minutes")
    parser.add_argument("--complexity", action="store_true", help="fit exponents on worlds of several sizes: minutes")
    parser.add_argument("--quick", action="store_true", help="a short calibration, to see that it works")
    by_hand = parser.add_argument_group("by hand, without a calibration")
    by_hand.add_argument("--doc-ms", type=number(0, is_open=True), help="milliseconds a document in the deep model")
    by_hand.add_argument("--documents", type=whole, help=f"{DOCUMENTS} if absent")
    by_hand.add_argument("--shards", type=whole_list, help="such as 1,5, which it is if absent")
    by_hand.add_argument("--fan-out-ms", type=number(0), help="milliseconds a shard, of who deals out; 0 if absent")


def run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    """Returns the exit code."""
    is_by_hand = parsed.doc_ms is not None
    for option in CALIBRATED if is_by_hand else FOR_HAND:
        if getattr(parsed, option) is not None and getattr(parsed, option) is not False:
            kind = "without --doc-ms" if is_by_hand else "with --doc-ms"
            parser.error(f"--{option.replace('_', '-')}: allowed only {kind}")
    if parsed.what_if and is_by_hand != (parsed.what_if.name in BY_HAND) and parsed.what_if.name not in BOTH:
        parser.error(f"--what-if: {', '.join(BY_HAND)} go with --doc-ms, the others without")
    parsed.documents, parsed.shards = parsed.documents or DOCUMENTS, parsed.shards or [1, 5]
    if max(parsed.shards) > parsed.documents:
        parser.error(f"--shards: at most one a document, {parsed.documents}")
    if is_by_hand:
        return _by_hand(parsed)
    try:
        known = _calibration(parser, parsed)
        check_is_of(known, parsed.bundle or Path(known.path))
        return _planned(parsed, known)
    except BrokenPipeError:
        raise
    except (CalibrationError, ValueError, RuntimeError, OSError) as e:
        why = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e
        print(f"refused: {why}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------------ calibrated


def _calibration(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> Calibration:
    """As it is kept; measured first, or added to, where that is asked for."""
    if not parsed.calibrate and not parsed.complexity:
        return calibration.read(parsed.calibration)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    if parsed.calibrate:
        bundle = parsed.bundle or BUNDLE
        if not (bundle / "manifest.json").exists():
            parser.error(f"--bundle {bundle}: there is none; name one, or make one: {MADE_BY}")
        full, asked = bundles.manifest_of(bundle)["funnel"], for_bundle(bundle, measure.POOL, parsed.requests)
        workers = parsed.workers or max(2, parsed.cores or 2)
        with bundles.folder_beside(bundle) as folder:
            retrieve, rerank = (max(full["k"], full[width] // NARROW) for width in ("retrieve", "rerank"))
            narrow = bundles.at_widths(bundle, folder, retrieve, rerank)
            half = bundles.at_half(narrow, folder)
            known = measure.calibrate(narrow, asked, workers, say, source=bundle, narrower=half, is_quick=parsed.quick)
    else:
        known = calibration.read(parsed.calibration)
        check_is_of(known, parsed.bundle or Path(known.path))
    if parsed.complexity:
        picture = parsed.calibration.with_name(GROWTH)
        known = complexity.measured(known, parsed.bundle or Path(known.path), picture, say, is_quick=parsed.quick)
    calibration.write(known, parsed.calibration)
    say(f"kept in {parsed.calibration}" + (f"; NOT TO BE TRUSTED: {known.doubt}" if known.doubt else ""))
    return known


def _planned(parsed: argparse.Namespace, known: Calibration) -> int:
    bundle = parsed.bundle or Path(known.path)
    manifest = bundles.manifest_of(bundle)
    full = manifest["funnel"]
    question = Question(
        qps=parsed.qps,
        p99_s=parsed.p99,
        items=parsed.items or known.items,
        retrieve=parsed.retrieve or full["retrieve"],
        rerank=parsed.rerank or full["rerank"],
        cores=parsed.cores or known.cores,
        workers=parsed.workers,
        price=parsed.price,
    )
    if not full["k"] <= question.rerank <= question.retrieve <= question.items:
        allowed = f"allowed is k = {full['k']} <= rerank <= retrieve <= items"
        shown = f"--rerank {question.rerank}, --retrieve {question.retrieve}, --items {question.items:,}"
        raise ValueError(f"{shown}: {allowed}")
    if parsed.quality_floor is not None:

        def cpu_s(retrieve: int, rerank: int) -> float:
            asked = replace(question, retrieve=retrieve, rerank=rerank)
            return sum(planning.variants(known, asked)[0].means().values())

        choice = widths.cheapest(manifest, parsed.quality_floor, cpu_s)
        print("\n".join(report.choice_lines(choice, cpu_s(full["retrieve"], full["rerank"]), parsed.quality_floor)))
        question = replace(question, retrieve=choice.retrieve, rerank=choice.rerank)
    if parsed.what_if:
        said = report.asked(question)
        return what_if(parsed, partial(_with, question), partial(_columns, known), _charts(question), said)
    plan = planning.plan(known, question)
    is_other = question.items != known.items
    kind = memory.kind_for(question.items, question.retrieve) if is_other else known.kind
    tables = memory.tables(bundle)
    held = memory.machine_bytes(known, tables, question.items, kind, plan.configuration.workers)
    print("\n".join(report.plan_lines(known, question, plan, held)))
    times = memory.machine_bytes(known, tables, known.items, known.kind, known.base.workers) / known.memory.pss
    print(f"{'memory':<20}  by formula, which gives {times:.2f} times the PSS measured of what was calibrated")
    return 1 if known.doubt and not known.is_quick else 0


def _with(question: Question, name: str, value: float) -> Question:
    changes: dict[str, Any] = {"p99_s": value / 1e3} if name == "p99" else {name: value}
    return replace(question, **changes)


def _columns(known: Calibration, question: Question) -> dict[str, float]:
    plan = planning.plan(known, question)
    return {
        "machines": plan.machines,
        "workers": plan.configuration.workers,
        "highest rate /s": plan.rate.likely,
        "rate low": plan.rate.low,
        "rate high": plan.rate.high,
        "p50 ms": _ms(plan.p50_s.likely),
        "p99 ms": _ms(plan.p99_s.likely),
        "p99 low": _ms(plan.p99_s.low),
        "p99 high": _ms(plan.p99_s.high),
    }


def _ms(seconds: float) -> float:
    """Infinite where a queue grows without end."""
    return seconds * 1e3 if seconds < report.ENDLESS_S else math.inf


def _charts(question: Question) -> list[tuple[str, tuple[tuple[str, str, str], ...], float | None]]:
    """Title, curves (their column, and those of the band), level."""
    sla_ms = question.p99_s * 1e3
    return [
        ("Latency at the rate asked for, ms", (("p99 ms", "p99 low", "p99 high"), ("p50 ms", "", "")), sla_ms),
        ("Highest rate of one machine at the SLA, a second", (("highest rate /s", "rate low", "rate high"),), None),
        ("Machines", (("machines", "", ""),), None),
    ]


# --------------------------------------------------------------------------------------------- by hand


def _by_hand(parsed: argparse.Namespace) -> int:
    asked = classic.Sum(parsed.documents, parsed.doc_ms / 1e3, (parsed.fan_out_ms or 0.0) / 1e3)
    if parsed.what_if:
        shards = parsed.shards[-1]

        def vary(name: str, value: float) -> tuple[classic.Sum, int, float]:
            if name == "documents":
                return replace(asked, documents=int(value)), shards, parsed.qps
            if name == "doc-ms":
                return replace(asked, document_s=value / 1e3), shards, parsed.qps
            return (asked, shards, value) if name == "qps" else (asked, int(value), parsed.qps)

        def columns(of: tuple[classic.Sum, int, float]) -> dict[str, float]:
            one, n, qps = of
            workers = one.workers(qps, n, parsed.p99)
            p50, p99 = one.percentiles_s(qps, n, workers) if workers else NONE
            return {
                "shards": n,
                "a lone request ms": one.alone_s(n) * 1e3,
                "workers": workers or math.nan,  # none is enough
                "p50 ms": p50.likely * 1e3,
                "p99 ms": p99.likely * 1e3,
            }

        drawn = [
            ("Latency, ms", (("a lone request ms", "", ""), ("p99 ms", "", "")), parsed.p99 * 1e3),
            (f"Workers for {parsed.qps:g} requests a second", (("workers", "", ""),), None),
        ]
        by_hand = f"{parsed.qps:g} requests a second, p99 <= {parsed.p99 * 1e3:g} ms, {shards} shards of"
        said = f"{by_hand} {asked.documents:,} documents at {asked.document_s * 1e3:g} ms"
        return what_if(parsed, vary, columns, drawn, said)
    found: dict[int, tuple[int, planning.Interval, planning.Interval] | str] = {}
    for n in parsed.shards:
        if workers := asked.workers(parsed.qps, n, parsed.p99):
            found[n] = workers, *asked.percentiles_s(parsed.qps, n, workers)
        else:
            found[n] = asked.hinders(parsed.qps, n, parsed.p99)
    print(f"{parsed.qps:,.0f} requests a second, p99 <= {parsed.p99 * 1e3:g} ms")
    print("\n".join(report.classic_lines(asked, parsed.shards, parsed.items, found)))
    return 0


def seconds(text: str) -> float:
    """100ms, 0.1s, or a number of milliseconds, as seconds."""
    unit, size = next((unit, size) for unit, size in (("ms", 1e-3), ("s", 1.0), ("", 1e-3)) if text.endswith(unit))
    return float(number(0, is_open=True)(text.removesuffix(unit))) * size


def whole(text: str) -> int:
    """A whole number above 0; 100e6 is one."""
    value = number(1)(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text}: allowed is a whole number, 1 or more")
    return int(value)


def whole_list(text: str) -> list[int]:
    return [whole(one) for one in text.split(",")]
