"""A page holds every section, needs nothing from elsewhere, and stands whatever came of the run."""

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from loadtest.lab import page
from loadtest.lab.difference import differences
from loadtest.observed import STAGES
from tests.loadtest.lab.made import made, observed

SECTIONS = (
    "Latency by percentile",
    "Latency over time",
    "Rate sent and answered",
    "Stage waterfall",
    "Degradations and coverage over time",
    "Errors by cause",
    "What ran",
)


def troubled():
    """503s in the first second, two causes of degradation in the second, slow ones in the third."""
    status, latency_s, causes = np.full(400, 200, np.int16), np.full(400, 0.010), [()] * 400
    status[:20], latency_s[40:60] = 503, 0.3
    causes[20:40] = [("reranking partial", "<b>odd</b> late")] * 20
    problem = ["<script>alert(1)</script>" if s == 503 else "" for s in status.tolist()]
    return observed(
        status=status, latency_s=latency_s, causes=causes, cause=[c[0] if c else "" for c in causes], problem=problem
    )


class Document(HTMLParser):
    """Which tags it has, what they point to, and whether they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.headings = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def assert_needs_nothing(text: str) -> Document:
    document = Document(text)
    assert document.open == []
    assert not document.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
    assert not document.attributes & {"src", "href", "srcset", "data", "action", "xlink:href"}
    assert not re.search(r"url\(|@import|https?:", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)  # noqa: S314 (our own text)
        assert not re.search(r"\b(nan|inf)\b", re.sub(r"<title>.*?</title>", "", svg, flags=re.DOTALL))
    return document


def test_a_report_holds_every_section_and_needs_nothing_from_elsewhere():
    text = page.report(made(troubled(), warm_up_s=1.0))
    document = assert_needs_nothing(text)
    assert tuple(document.headings) == SECTIONS
    assert text.count("<svg") == 7
    assert "prefers-color-scheme:dark" in text
    assert "503 Service Unavailable" in text and "&lt;b&gt;odd&lt;/b&gt; late" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "warm-up" in text and "SLA 100 ms" in text and "0123456789ab" in text
    assert "Over the SLA" in text  # 5 % after 300 ms


def test_a_run_of_which_nothing_was_answered_can_be_looked_at():
    seen = observed(
        status=np.zeros(400, np.int16), error=["unreachable"] * 400, took_s=np.full((400, len(STAGES)), math.nan)
    )
    text = page.report(made(seen))
    document = assert_needs_nothing(text)
    assert tuple(document.headings) == SECTIONS
    assert "None of 400 requests was answered" in text and "Nothing was answered." in text


@pytest.mark.parametrize(("n", "seconds"), [(1, 0.1), (40, 2.0), (400, 2_000.0)])
def test_short_and_long_runs_can_be_looked_at(n, seconds):
    assert_needs_nothing(page.report(made(observed(n, rate=n / seconds), seconds=seconds)))


def test_the_badge_says_what_matters_most():
    late = observed(sent_late_s=np.full(400, 0.02), latency_s=np.full(400, 0.3))
    assert page.verdict(made(late))[0] == "Invalid run"
    assert "say nothing about the service" in page.report(made(late))
    assert page.verdict(made(observed(latency_s=np.full(400, 0.3))))[0] == "Over the SLA"
    failed = observed(status=np.where(np.arange(400) < 2, 503, 200).astype(np.int16))
    assert page.verdict(made(failed))[0] == "Requests failed"
    degraded = observed(cause=["reranking partial"] * 400, causes=[("reranking partial",)] * 400)
    assert page.verdict(made(degraded))[0] == "Within the SLA, degraded"
    assert page.verdict(made())[0] == "Within the SLA"


def test_a_share_isnt_rounded_up_to_all():
    run = made()
    text = page.tiles(replace(run, figures=replace(run.figures, within_sla=0.99999)))
    assert "99.99 <small>%</small>" in text


def test_two_runs_are_in_the_same_pictures():
    a, b = made(), made(troubled())
    found = differences(a, b)
    text = page.comparison(a, b, ("one.json", "<two>.json"), found)
    document = assert_needs_nothing(text)
    assert tuple(document.headings) == ("Differences", *SECTIONS)
    assert "&lt;two&gt;.json" in text
    assert all(d.name in text.replace("&#x27;", "'") for d in found)
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert re.search(r'"(line|fill) a', picture) and re.search(r'"(line|fill) b', picture)


def test_a_comparison_says_what_is_invalid_and_what_isnt_comparable():
    late = observed(sent_late_s=np.full(400, 0.02))
    text = page.comparison(a := made(late), b := made(sla_s=0.05), ("a", "b"), differences(a, b))
    assert "A is invalid" in text and "A was judged by 100 ms, B by 50 ms" in text
