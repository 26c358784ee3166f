"""Define the exceptions for a user's mistake and for a run that failed."""


class UserError(ValueError):
    """A mistake in a config, a path or a data file: one line that names the field, the value and the fix.

    The command line prints it without a traceback and exits with code 2. From Python it is a ``ValueError``.
    """


class NoRowsError(UserError):
    """A data set without a usable row."""


class RunFailedError(RuntimeError):
    """A run that cannot continue, with the reason in one line. The original error is its cause.

    The command line prints it without a traceback and exits with code 1.

    Attributes:
        everywhere: Whether all processes of the run raise the same error, so that only one of them prints it.
    """

    everywhere = False


class StoppedError(SystemExit):
    """A run that stopped on request, with a checkpoint of its last step. Exits with ``CODE`` if not caught."""

    CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again
    code: int


class NonFiniteError(RunFailedError, ArithmeticError):
    """The loss or the gradient of an optimizer step is NaN or infinite; the step was not taken."""

    everywhere = True
