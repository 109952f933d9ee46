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
