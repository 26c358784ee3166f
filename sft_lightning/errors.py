"""Define the exceptions for user mistakes, failed runs and requested stops, and the check of numeric options."""

from math import inf, isfinite


class UserError(ValueError):
    """A mistake in a config, a path or a data file; the message is one line with the field, the value and the fix.

    The command line prints it without a traceback and exits with code 2. From Python it is a ``ValueError``.
    """


class NoRowsError(UserError):
    """A data set without usable rows."""


class RunFailedError(RuntimeError):
    """A run that cannot continue; the message is one line, and the original error is chained to it.

    The command line prints it without a traceback and exits with code 1.

    Attributes:
        everywhere: Whether all processes of the run raise the same error, so that only one needs to print it.
    """

    everywhere = False


class StoppedError(SystemExit):
    """A run that stopped on request, with a checkpoint of its last step. Exits with ``CODE`` if not caught."""

    CODE = 75  # EX_TEMPFAIL of sysexits.h: the command can be retried
    code: int


class NonFiniteError(RunFailedError, ArithmeticError):
    """The loss or gradient of an optimizer step, or a weight after it, is NaN or infinite; nothing of it is saved."""

    everywhere = True


def check_at_least(minimum: float, section: str, **options: float | None) -> None:
    """Checks the numeric options of a section of the config. An option that is None is not set.

    Raises:
        UserError: For the first option that is below ``minimum``, NaN or infinite.
    """
    for name, value in options.items():
        if value is not None and not minimum <= value < inf:
            wanted = f"at least {minimum}" if isfinite(value) else "a finite number"
            raise UserError(f"{section}.{name} must be {wanted}, got {value}")
