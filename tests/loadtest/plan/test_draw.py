"""A picture is sound XML, inside its frame, and says what is what."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from loadtest.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from loadtest.plan.draw import Curve, chart, page

X = [1.0, 10.0, 100.0]


def sound(drawn: str) -> None:
    ET.fromstring(f"<div>{drawn}</div>")  # noqa: S314 (our own text)


def points(drawn: str) -> list[tuple[float, float]]:
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', drawn)
    return [tuple(map(float, p.split(","))) for line in lines for p in line.split()]  # type: ignore[misc]


def test_a_line_goes_from_edge_to_edge_evenly_in_ratio() -> None:
    drawn = points(chart("t", "qps", X, [Curve("p99", [0.0, 1.0, 2.0])]))
    assert [x for x, _ in drawn] == [LEFT, pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1), WIDTH - RIGHT]
    assert drawn[0][1] == HEIGHT - BOTTOM
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in drawn)


def test_a_gap_and_an_endless_band_stay_in_the_frame() -> None:
    curve = Curve("p99", [1.0, math.nan, 2.0], [0.5, 0.5, 0.5], [1e9, math.inf, 3.0])
    drawn = chart("t", "qps", X, [curve], level=1.5)
    assert "nan" not in drawn and "inf" not in drawn
    assert len(set(points(drawn))) == 2
    assert all(TOP <= float(y) <= HEIGHT - BOTTOM for y in re.findall(r"[\d.]+,([\d.]+)", drawn))


def test_one_value_and_no_value_can_be_drawn() -> None:
    for y in ([3.0], [math.nan], [0.0]):
        sound(chart("t", "x", [5.0], [Curve("c", y)]))


def test_a_point_tells_its_values_and_a_line_its_name() -> None:
    drawn = chart("t", "qps", X, [Curve("p50", [1.0, 2.0, 3.0]), Curve("p99", [4.0, math.nan, 6.0])])
    assert "<title>qps 1: p50 1, p99 4</title>" in drawn
    assert "<title>qps 10: p50 2</title>" in drawn
    assert drawn.count("</i>p") == 2


def test_a_page_needs_nothing_from_elsewhere_and_escapes_what_it_is_told() -> None:
    text = page("a < b", "said & done", [chart("<t>", "q&d", X, [Curve("c>", [1, 2, 3])])], "1 < 2")
    assert "http" not in text and "<script" not in text and "src=" not in text
    assert "a &lt; b" in text and "1 &lt; 2" in text
    sound(re.findall(r"<svg.*</svg>", text, re.DOTALL)[0])
