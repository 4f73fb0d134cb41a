"""What takes the place of a stage that is late or failed: one table, and nothing else decides it.

Only faults are in this table: StageFailed, or time that ran out. A broken contract or a programmer's error
passes through it untouched and becomes a 500.
"""

from app.flow import Degradation, Outcome, Stage

# stage → what its consumers get instead
SUBSTITUTES = {
    Stage.RETRIEVAL: "popular items",
    Stage.PRERANKING: "retrieval scores",
    Stage.RERANKING: "pre-rank scores",
}

# What can be said of a departure, closed because it is a metric's label.
REASONS = {Outcome.LATE: "late", Outcome.FAILED: "failed", Outcome.PARTIAL: "partial"}


# The look-up of the person belongs to retrieval, which reads it first.
USER_LATE = Degradation(Stage.RETRIEVAL, "user_late", "what the request says of the person")


def degradation(stage: Stage, outcome: Outcome) -> Degradation:
    """The record of this departure. Raises KeyError for an outcome that isn't one."""
    return Degradation(stage, REASONS[outcome], SUBSTITUTES[stage])
