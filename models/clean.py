"""The catalogue as models and filters want it: years as numbers, genres as lists, titles told apart.

What was found in MovieLens-100k and what is done about it: one film has no title, year or genre at all,
and one has its year inside the title ("… (1995)") and a "V" in its place: the year is taken from the title
where it stands there, else it is -1 for filters and the catalogue's median for models. Twenty-three titles
stand twice. Some are different films (Cape Fear of 1962 and of 1991), most are one film entered twice, with
the ratings spread over both. All rows stay, since people hold these ids and every published figure ranks
1,682 items; titles carry the year, and those still equal carry their id.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.datasets.movielens import Ratings

UNKNOWN_GENRE = "unknown"
MIN_FILMS_A_WORD = 3  # a title word in fewer films says nothing about the next film


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Cleaned items, row by row.

    ids i64[N]; titles U[N], unique; year i16[N], -1 unknown; genres i16[N, G], numbers of genre_names,
    padded with -1; content f32[N, C]: what the item tower reads besides the id (genres, year, title words).
    """

    ids: NDArray[np.int64]
    titles: NDArray[np.str_]
    year: NDArray[np.int16]
    genres: NDArray[np.int16]
    genre_names: tuple[str, ...]
    content: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def decade(self) -> NDArray[np.float32]:
        """f32[N]: decades since 1990; the median where the year is unknown."""
        return decades(self.year)


def clean(ratings: Ratings) -> Catalogue:
    """The catalogue of these ratings."""
    year = np.array([clean_year(y, t) for y, t in zip(ratings.years, ratings.titles, strict=True)], np.int16)
    genres, genre_names = genre_table(ratings.genres)
    content = np.concatenate(
        [shares(genres, len(genre_names)), year_columns(year), word_columns(ratings.titles)], axis=1
    )
    return Catalogue(
        ids=ratings.item_ids,
        titles=distinct_titles(ratings.titles, year, ratings.item_ids),
        year=year,
        genres=genres,
        genre_names=genre_names,
        content=content.astype(np.float32),
    )


def clean_year(year: str, title: str) -> int:
    """The year as a number: the field if it is one, else the "(1995)" in the title, else -1."""
    if re.fullmatch(r"(18|19|20)\d\d", year):
        return int(year)
    inside = re.search(r"\(((?:18|19|20)\d\d)\)", title)
    return int(inside.group(1)) if inside else -1


def distinct_titles(titles: Sequence[str], year: NDArray[np.int16], ids: NDArray[np.int64]) -> NDArray[np.str_]:
    """ "Title (year)", and "Title (year) #id" where two rows would still read the same."""
    plain = [re.sub(r"\s*\(\d{4}\)\s*$", "", title).strip() for title in titles]
    dated = [f"{t} ({y})" if y > 0 else t for t, y in zip(plain, year, strict=True)]
    often = Counter(dated)
    return np.array([t if often[t] == 1 else f"{t} #{i}" for t, i in zip(dated, ids, strict=True)])


def genre_table(genres: Sequence[str]) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """Lists of genre names, separated by spaces → numbers i16[N, G] padded with -1, and the names, sorted."""
    lists = [[g for g in text.split() if g != UNKNOWN_GENRE] for text in genres]
    names = tuple(sorted({g for one in lists for g in one}))
    table = np.full((len(lists), max(map(len, lists), default=1)), -1, np.int16)
    for row, one in enumerate(lists):
        table[row, : len(one)] = [names.index(g) for g in one]
    return table, names


def shares(numbers: NDArray[np.int16], n: int) -> NDArray[np.float32]:
    """f32[N, n]: 1 / sqrt(count) at each of a row's numbers, so that every row has length 1 (or 0)."""
    columns = np.zeros((len(numbers), n), np.float32)
    row, place = np.nonzero(numbers >= 0)
    columns[row, numbers[row, place]] = 1.0
    return columns / np.sqrt(np.maximum(columns.sum(axis=1, keepdims=True), 1.0))


def decades(year: NDArray[np.int16]) -> NDArray[np.float32]:
    """f32[N]: (year - 1990) / 10, with the median of the known years for -1."""
    median = np.median(year[year > 0]) if (year > 0).any() else 1990
    return ((np.where(year > 0, year, median) - 1990) / 10).astype(np.float32)


def year_columns(year: NDArray[np.int16]) -> NDArray[np.float32]:
    """f32[N, 11]: the decade, at least -3, and ten 0/1 columns "1989 or before", 1990 … "1998 or later"."""
    decade = np.maximum(decades(year), -3.0)
    which = np.clip(np.round(decade * 10) + 1, 0, 9).astype(np.int64)
    return np.concatenate([decade[:, None], np.eye(10, dtype=np.float32)[which]], axis=1)


def word_columns(titles: Sequence[str]) -> NDArray[np.float32]:
    """f32[N, W]: title words of three letters or more, found in three films or more; rows of length 1 or 0."""
    words = [sorted(set(re.findall(r"[a-z]{3,}", title.lower()))) for title in titles]
    films = Counter(word for one in words for word in one)
    known = sorted(word for word, n in films.items() if n >= MIN_FILMS_A_WORD)
    number = {word: column for column, word in enumerate(known)}
    columns = np.zeros((len(titles), len(known)), np.float32)
    for row, one in enumerate(words):
        columns[row, [number[word] for word in one if word in number]] = 1.0
    return columns / np.sqrt(np.maximum(columns.sum(axis=1, keepdims=True), 1.0))
