"""UserError: what the person at the keyboard can put right."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Something the user can fix. One line each: what is wrong, the value, what would be right."""

    def __init__(self, *lines: str) -> None:
        """Keep the lines; the command line prints them and exits with code 2."""
        super().__init__("\n".join(lines))
        self.lines = lines


class DamagedError(OSError):
    """A file whose content is wrong: another try reads the same."""


class CommonError(UserError):
    """One that every worker of a run meets alike, and that another try does not change."""


class StoppedError(Exception):
    """A run ended because a signal asked for it; its state is saved.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        """Remember the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number
