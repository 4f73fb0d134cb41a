"""A picture is sound XML, inside its frame, and says what is what."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from loadtest.plan.draw import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, chart, page, ticks

X = [1.0, 10.0, 100.0]


def sound(svg: str) -> None:
    ET.fromstring(svg)  # noqa: S314 (our own text)


def points(svg: str) -> list[tuple[float, float]]:
    (line,) = re.findall(r'<polyline points="([^"]*)"', svg)
    return [tuple(map(float, p.split(","))) for p in line.split()]  # type: ignore[misc]


def test_a_line_goes_from_edge_to_edge_evenly_in_ratio() -> None:
    drawn = points(chart("t", "qps", X, [Curve("p99", [0.0, 1.0, 2.0])]))
    assert [x for x, _ in drawn] == [LEFT, pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1), WIDTH - RIGHT]
    assert drawn[0][1] == HEIGHT - BOTTOM
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in drawn)


def test_a_gap_and_an_endless_band_stay_in_the_frame() -> None:
    curve = Curve("p99", [1.0, math.nan, 2.0], [0.5, 0.5, 0.5], [1e9, math.inf, 3.0])
    svg = chart("t", "qps", X, [curve], level=1.5)
    assert "nan" not in svg and "inf" not in svg
    assert len(points(svg)) == 2
    assert all(TOP <= float(y) <= HEIGHT - BOTTOM for y in re.findall(r"[\d.]+,([\d.]+)", svg))


def test_one_value_and_no_value_can_be_drawn() -> None:
    for y in ([3.0], [math.nan], [0.0]):
        sound(chart("t", "x", [5.0], [Curve("c", y)]))


def test_a_page_needs_nothing_from_elsewhere_and_escapes_what_it_is_told() -> None:
    text = page("a < b", "said & done", [chart("<t>", "q&d", X, [Curve("c>", [1, 2, 3])])], "1 < 2")
    assert "http" not in text and "<script" not in text and "src=" not in text
    assert "a &lt; b" in text and "1 &lt; 2" in text
    sound(re.findall(r"<svg.*</svg>", text, re.DOTALL)[0])


@pytest.mark.parametrize("top", [0.003, 0.9, 1.0, 7.0, 99.0, 12_345.0])
def test_ticks_are_few_round_and_inside(top: float) -> None:
    found = ticks(top)
    assert 4 <= len(found) <= 11
    assert found[0] == 0 and found[-1] <= top
