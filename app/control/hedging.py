"""When a late shard may be scored a second time: a budget of extra work. A pure rule.

Every row that is scored the first time earns `share` of a row; a hedge spends the rows that it sends again. What is
earned can't be hoarded past `MOST`, or two jobs of this size, so that a bad minute after a good day stays within the
share as well.
"""

from dataclasses import dataclass

SHARE = 0.05  # rows scored twice over rows scored
MOST = 1_000.0  # rows: four shards of 250
LATE = 2.0  # a shard is late when it took so many times what it was expected to take ...
LATE_S = 2e-3  # ... and so many seconds more


@dataclass(slots=True)
class HedgeBudget:
    """Rows that may still be scored again."""

    left: float = 0.0

    def earn(self, n_rows: int) -> None:
        """So many rows were handed out for the first time."""
        self.left = min(max(MOST, 2.0 * n_rows), self.left + SHARE * n_rows)

    def spend(self, n_rows: int) -> bool:
        """Whether so many rows may be scored again; if so they are paid for."""
        if n_rows > self.left:
            return False
        self.left -= n_rows
        return True


def late_after(expected_s: float) -> float:
    """Seconds after which a shard that should take `expected_s` is late."""
    return LATE * expected_s + LATE_S
