"""Cleaning: the dirt that is in MovieLens-100k, and what becomes of it."""

import numpy as np

from models import clean


def test_a_year_is_read_from_the_title_when_its_field_is_dirty() -> None:
    assert clean.clean_year("1995", "Toy Story") == 1995
    assert clean.clean_year("V", "Land Before Time III (1995)") == 1995
    assert clean.clean_year("unkonwn", "unkonwn") == -1


def test_titles_that_stand_twice_are_told_apart() -> None:
    titles = ["Cape Fear", "Cape Fear", "Hugo Pool", "Hugo Pool", "Heat"]
    year = np.array([1962, 1991, 1997, 1997, -1], np.int16)
    named = clean.distinct_titles(titles, year, np.arange(10, 15))
    expected = ["Cape Fear (1962)", "Cape Fear (1991)", "Hugo Pool (1997) #12", "Hugo Pool (1997) #13", "Heat"]
    assert named.tolist() == expected


def test_genres_become_numbers_and_unknown_is_none() -> None:
    table, names = clean.genre_table(["Comedy Action", "unknown", "Comedy"])
    assert names == ("Action", "Comedy")
    assert table.tolist() == [[1, 0], [-1, -1], [1, -1]]
    np.testing.assert_allclose(clean.shares(table, 2), [[0.5**0.5, 0.5**0.5], [0, 0], [0, 1]], rtol=1e-6)


def test_an_unknown_year_counts_as_the_median() -> None:
    np.testing.assert_allclose(clean.decades(np.array([1980, -1, 1990, 2000], np.int16)), [-1, 0, 0, 1])
