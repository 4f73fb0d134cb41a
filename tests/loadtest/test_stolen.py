"""What a hypervisor took is the eighth number of /proc/stat's first row, in ticks; a share is of all cores."""

import os

import pytest

from loadtest.stolen import stolen_s
from tests.loadtest.lab.made import observed


def test_it_is_the_eighth_number_of_the_first_row_in_ticks() -> None:
    per_s = os.sysconf("SC_CLK_TCK")
    stat = f"cpu  10 20 30 40 50 60 70 {3 * per_s} 90 0\ncpu0 1 2 3 4 5 6 7 8 9 0\nbtime 1\n"
    assert stolen_s(stat) == 3.0


@pytest.mark.parametrize("stat", ["", "cpu 1 2 3", "cpu a b c d e f g h i"])
def test_a_kernel_that_does_not_say_took_nothing(stat: str) -> None:
    assert stolen_s(stat) == 0.0


def test_this_machine_says_something_that_never_falls() -> None:
    assert 0.0 <= stolen_s() <= stolen_s()


def test_a_share_is_of_all_cores() -> None:
    assert observed(wall_s=10.0, stolen_s=0.5 * (os.cpu_count() or 1)).stolen_share == pytest.approx(0.05)
