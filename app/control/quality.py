"""Quality first: narrow the funnel before anybody is refused. Pure rules; the clock is an argument.

    q <- q + step                      if the request would have been in time at its wanted width
    q <- q - step · p / (1 - p)        if not, or if it had to be refused
    q <- q + recovery · seconds        as time goes by

With p = 0.99 one request that would have been late pulls as much as 99 that would have been in time, so q settles
where percentile p of latency meets the SLA. At 400 requests a second the two kinds of rise are alike; with little
traffic time alone brings q from its floor back to 1 within two seconds.

    p = 0.99, step = 0.001: after 10 in time and 1 late within a moment, q = 1 - 0.099 (the rise stops at 1)

It hears of a load only from what has ended late, and swings. So a request is narrowed by how many others wait as well,
as it comes and again as it is begun, which holds the queue where it is:

    q <= 1 - (1 - floor) · (n / most - a) / (b - a)     for n from a · most to b · most

n: in flight beyond what workers can have at once. most: beyond which no answer in time can be hoped for
(control/admission.py).

Widths are multiplied by powers of q. Re-ranking costs most by the item and its last items matter least: on W1 half of
what is retrieved loses .25 of the full funnel's NDCG@20 and saves 0.4 ms, half of what is re-ranked .03 and 0.5 ms. So
it gives way first; of what was found all is pre-ranked, which costs next to nothing.

Source: the quality factor of product-mixer; the powers, floor and recovery are ours (0.3: a third is retrieved, a
tenth re-ranked; by the table of W1 .25 would lose .52 of NDCG@20, .3 does .46).
"""

from dataclasses import dataclass

from app.flow import Stage

FLOOR = 0.3
POWERS = {Stage.RETRIEVAL: 1, Stage.PRERANKING: 0, Stage.RERANKING: 2}
STEP = 0.001
PERCENTILE = 0.99
FEW, MANY = 0.3, 0.5  # a and b: so far below where admission refuses that a burst finds room
RECOVERY_PER_S = (1 - FLOOR) / 1.8  # two seconds after the load went, with what is still in flight then


def at_depth(share: float) -> float:
    """The most that quality may be for a request beside which so many are in flight, a share of the most."""
    return 1 - (1 - FLOOR) * min(1.0, max(0.0, (share - FEW) / (MANY - FEW)))


@dataclass(slots=True)
class Quality:
    """The factor q, in [floor, 1].

    at: when it was last moved, seconds. floored_at: since when it has been at its floor, if it is there.
    """

    value: float = 1.0
    at: float = 0.0
    floored_at: float = 0.0

    def now(self, now: float) -> float:
        """The quality at this instant: the value, risen since by the time that went by."""
        return min(1.0, self.value + RECOVERY_PER_S * max(0.0, now - self.at))

    def is_at_floor(self, now: float) -> bool:
        """Whether there is nothing left to narrow; within one late request's pull of the floor counts."""
        return self.now(now) <= FLOOR + STEP * PERCENTILE / (1 - PERCENTILE)

    def finished(self, now: float, *, is_in_time: bool) -> None:
        """A request ended; it would have been in time at its wanted width, or not."""
        change = STEP if is_in_time else -STEP * PERCENTILE / (1 - PERCENTILE)
        was_at_floor = self.is_at_floor(now)
        self.value, self.at = min(1.0, max(FLOOR, self.now(now) + change)), now
        if not (was_at_floor and self.is_at_floor(now)):
            self.floored_at = now
