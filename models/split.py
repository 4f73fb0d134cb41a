"""Who knew what when: the time line, its 60/20/20 cuts, and the queries of the two protocols.

The rule that must hold: a query's history lies strictly before its target's second. Events of one second
(44 % of the people have ties at their last one) are shuffled by a seed, never ordered by item id.

    |—— fit: 60 % of the events ——|—— tuning: 20 % ——|—— test: 20 % ——|  → time

Rolling next event: every event of an interval is a target, at most 20 sampled a person.
Leave one out: the last event of each person is the target; the second-last is for tuning.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Events grouped by person and, for a person, in order of time; ties in random order.

    person, item, time (seconds): i64[E]. first i64[E]: the person's first event. history_end i64[E]: the
    first event of the same person in the same second, so event e's history is first[e] … history_end[e].
    """

    person: Rows
    item: Rows
    time: Rows
    first: Rows
    history_end: Rows
    n_items: int

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True, slots=True)
class Queries:
    """What is asked in a protocol, one target each.

    events i64[Q]: the target's event in the time line. until i64[Q]: the first event of the person that
    no longer counts as later. seen_until i64[Q]: events of the person before it leave the ranking.
    """

    timeline: Timeline
    events: Rows
    until: Rows
    seen_until: Rows

    def __len__(self) -> int:
        return len(self.events)

    @property
    def person(self) -> Rows:
        return self.timeline.person[self.events]

    @property
    def target(self) -> Rows:
        return self.timeline.item[self.events]

    def history(self, q: int) -> Rows:
        """Item rows before query q's second, oldest first."""
        event = self.events[q]
        return self.timeline.item[self.timeline.first[event] : self.timeline.history_end[event]]

    def seen(self, q: int) -> Rows:
        """Item rows that are not ranked in query q."""
        return self.timeline.item[self.timeline.first[self.events[q]] : self.seen_until[q]]

    def later(self, q: int) -> Rows:
        """Item rows that the person comes to in the interval, the target among them."""
        return self.timeline.item[self.timeline.history_end[self.events[q]] : self.until[q]]

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> "Queries":
        """Some of the queries."""
        return Queries(self.timeline, self.events[which], self.until[which], self.seen_until[which])


def timeline(person: Rows, item: Rows, time: Rows, n_items: int, seed: int) -> Timeline:
    """The time line of these events, ties shuffled by the seed."""
    shuffle = np.random.default_rng(seed).permutation(len(person))
    order = shuffle[np.lexsort((time[shuffle], person[shuffle]))]
    person, item, time = person[order], item[order], time[order]
    key = np.stack([person, time], axis=1)
    is_new = np.ones(len(key), bool)
    is_new[1:] = (key[1:] != key[:-1]).any(axis=1)
    second = np.maximum.accumulate(np.where(is_new, np.arange(len(key)), 0))
    return Timeline(person, item, time, np.searchsorted(person, person), second, n_items)


def cuts(time: Rows) -> tuple[int, int]:
    """The instants (seconds) before which 60 % and 80 % of the events lie."""
    ordered = np.sort(time)
    return int(ordered[int(0.6 * len(time))]), int(ordered[int(0.8 * len(time))])


def before(line: Timeline, instant: int) -> Rows:
    """The events before an instant: what may be fitted on."""
    return np.flatnonzero(line.time < instant)


def rolling(line: Timeline, since: int, until: int, seed: int, per_person: int = 20) -> Queries:
    """The events in [since, until) as targets, at most `per_person` of a person, drawn by the seed."""
    inside = np.flatnonzero((line.time >= since) & (line.time < until))
    drawn = np.random.default_rng(seed).permutation(inside)
    drawn = drawn[np.argsort(line.person[drawn], kind="stable")]
    place = np.arange(len(drawn)) - np.searchsorted(line.person[drawn], line.person[drawn])
    events = np.sort(drawn[place < per_person])
    key = line.person * (int(line.time.max()) + 1) + line.time  # rises along the time line
    ends = np.searchsorted(key, line.person[events] * (int(line.time.max()) + 1) + until)
    return Queries(line, events, ends, line.history_end[events])


def leave_one_out(line: Timeline, back: int = 1) -> tuple[Rows, Queries]:
    """The events to fit on, and the query of each person: their last event (back = 2: the second-last).

    Ranked are the items that the person has no fitted event with, those of the target's second included.
    """
    ends = np.searchsorted(line.person, np.unique(line.person), side="right")
    targets = ends - back
    fit_until = np.zeros(int(line.person.max()) + 1, np.int64)
    fit_until[line.person[targets]] = targets
    fit = np.flatnonzero(np.arange(len(line)) < fit_until[line.person])
    return fit, Queries(line, targets, targets + 1, targets)


def recent(line: Timeline, events: Rows, length: int) -> Rows:
    """i64[Q, length]: the last items of each event's history, newest first, -1 where there are no more."""
    places = line.history_end[events][:, None] - 1 - np.arange(length)
    return np.where(places >= line.first[events][:, None], line.item[np.maximum(places, 0)], -1)


def seen_matrix(line: Timeline, events: Rows) -> NDArray[np.float32]:
    """f32[Q, N]: 1 where the item is in the event's history."""
    matrix = np.zeros((len(events), line.n_items), np.float32)
    counts = line.history_end[events] - line.first[events]
    rows = np.repeat(np.arange(len(events)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    matrix[rows, line.item[np.repeat(line.first[events], counts) + offsets]] = 1.0
    return matrix
