"""The exceptions that stand for a mistake of the user's, and for a run that went wrong."""


class UserError(ValueError):
    """A mistake in a config, a path or a data file: one line that names the field, the value and the fix.

    The command line prints it without a traceback and exits with code 2. From Python it is a ``ValueError``.
    """


class NoRowsError(UserError):
    """A data set of which no row can be used."""


class RunFailedError(RuntimeError):
    """A run that cannot go on, for a reason that one line can tell; what it came from is chained to it.

    The command line prints it without a traceback and exits with code 1.

    Attributes:
        everywhere: Whether all processes of the run raise the same, so that one of them is enough to tell.
    """

    everywhere = False


class StoppedError(SystemExit):
    """A run that left on request, with a checkpoint of its last step. Exits with ``CODE``, if not caught."""

    CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again
    code: int


class NonFiniteError(RunFailedError, ArithmeticError):
    """The loss or the gradient of an optimizer step is NaN or infinite; the step was not taken."""

    everywhere = True
