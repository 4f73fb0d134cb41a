"""Pictures are sound XML inside their frame; marks are round and few; what is told is escaped."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from loadtest.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Plot, legend, shown, ticks

X, Y = Axis.linear(0, 10, "seconds"), Axis.log(1, 100, "ms")


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="[^"]*" points="([^"]*)"', svg)
    return [[(float(a), float(b)) for a, b in (p.split(",") for p in line.split())] for line in lines]


def test_a_line_goes_from_edge_to_edge_and_ratios_have_the_same_room():
    plot = Plot(X, Y)
    plot.line([0, 5, 10], [1, 10, 100], "a")
    ((left, middle, right),) = points(plot.svg("t"))
    assert left == (LEFT, HEIGHT - BOTTOM) and right == (WIDTH - RIGHT, TOP)
    assert middle == (pytest.approx((LEFT + WIDTH - RIGHT) / 2), pytest.approx((TOP + HEIGHT - BOTTOM) / 2))


def test_a_gap_splits_a_line_and_what_is_outside_stays_at_the_edge():
    plot = Plot(X, Y)
    plot.line([0, 1, 2, 3, 4], [5, math.nan, 1e9, 0, math.inf], "a")
    first, second = points(plot.svg("t"))
    assert len(first) == 2 and first[0] == first[1]  # a single point is seen as well
    assert [y for _, y in second] == [TOP, HEIGHT - BOTTOM]


def test_everything_at_once_is_sound_and_escaped():
    plot = Plot(X, Axis.linear(0, 4, "a < b"))
    plot.span(0, 2, "<warm>")
    plot.band([0, 1, 2], [0, math.nan, 1], [1, 2, 2], "a")
    plot.bars([0, 1], 1.0, [0, 0], [1, 0], "b")
    plot.density([0, 1, 2], [0, 1, 2], np.array([[0, 3], [1, 0]]), "a")
    plot.density([0, 1], [0, 1], np.zeros((1, 1)), "a")
    plot.rule(3, "SLA & more")
    plot.rule(30, "out of the picture")
    plot.dot(1, 1, "a", "1 < 2")
    plot.hit(0, 1, "5 > 4\nnext")
    svg = plot.svg('"title"')
    root = ET.fromstring(svg)  # noqa: S314 (our own text)
    assert root.attrib["aria-label"] == '"title"'
    assert root.find(".//title").text == "5 > 4\nnext"
    assert "out of the picture" not in svg and "nan" not in svg
    assert "&lt;i&gt;" in legend([("a", "<i>")])


@pytest.mark.parametrize(("low", "high"), [(0, 0.003), (0, 1), (0, 7), (17, 99), (0, 12_345), (3, 3)])
def test_marks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in found)


def test_marks_of_a_ratio_are_1_2_5():
    assert [text for _, text in Axis.log(0.9, 60, "ms").marks] == ["1", "2", "5", "10", "20", "50"]
    assert [text for _, text in Axis.log(0.1, 20_000, "ms").marks] == ["0.1", "1", "10", "100", "1,000", "10,000"]
    assert Axis.log(5, 5, "ms").share(5) == 0  # an axis has a length


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (12.345, "12.3"), (123.4, "123"), (12_345, "12,345"), (math.nan, "–")],
)
def test_numbers_are_short(value, text):
    assert shown(value) == text
