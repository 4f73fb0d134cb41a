"""What takes the place of a stage that is late or failed: one table, and nothing else decides it.

Only faults are in this table: StageFailed, or time that ran out. A broken contract or a programmer's error
passes through it untouched and becomes a 500.
"""

from math import ceil

from app.flow import Degradation, Outcome, Stage

# stage → what its consumers get instead
INSTEAD = {Stage.RETRIEVAL: "popular items", Stage.PRERANKING: "retrieval scores", Stage.RERANKING: "pre-rank scores"}

# What can be said of a departure, closed because it is a metric's label.
REASONS = {Outcome.LATE: "late", Outcome.FAILED: "failed", Outcome.PARTIAL: "partial"}
BY_TIME, BY_LOAD = "narrowed_by_time", "narrowed_by_load"
ALL_REASONS = (*REASONS.values(), BY_TIME, BY_LOAD)

# The look-up of the person belongs to retrieval, which reads it first.
USER_LATE = Degradation(Stage.RETRIEVAL, "user_late", "what the request says of the person")


def narrowed(wanted: int, share: float, fits: int, least: int = 0) -> tuple[int, str | None]:
    """The width that a stage is given, and why it is less than wanted.

    width = min(wanted, max(least, min(ceil(wanted · share), fits)))

    share: what the load leaves of it.
    """
    by_load = ceil(wanted * share)
    width = min(wanted, max(least, min(by_load, fits)))
    why = BY_TIME if fits < by_load else BY_LOAD
    return width, why if width < wanted else None


def degradation(stage: Stage, outcome: Outcome, narrowing: str | None = None) -> Degradation:
    """The record of this departure. Raises KeyError for an outcome that isn't one.

    narrowing: why the stage was given less than it wanted, when all of that was done.
    """
    is_narrow = outcome is Outcome.PARTIAL and stage is Stage.RETRIEVAL
    return Degradation(stage, narrowing or REASONS[outcome], "fewer candidates" if is_narrow else INSTEAD[stage])
