"""What a command of `python -m models` can't do for a reason that its user can mend: told without a trace."""


class Refused(Exception):
    """The message is one sentence: what, the value, what is allowed."""
