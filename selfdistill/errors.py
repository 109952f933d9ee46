"""What a user can fix, and the fix.

Every mistake that a user can mend is raised as :class:`UserError` with a message of one line that names the file,
row or setting, says what was found and what to do. The command line prints that line and exits with code 2, without a
traceback. Anything else that escapes is a defect of this package.
"""


class UserError(ValueError):
    """A mistake in data, settings, model or machine that the user can mend.

    ``str(error)`` is what the command line prints: where it is, what was found, what to do.
    """

    exit_code = 2


class RunStopped(UserError):
    """A run ended before its last step; what it had done is saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class RunFailed(UserError):
    """Training itself went wrong (not finite). Exit code 3."""

    exit_code = 3


class RunCollapsed(RunFailed):
    """A run fell apart and was stopped; ``final/`` has the model of the last measurement before."""
