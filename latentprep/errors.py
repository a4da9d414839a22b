"""Errors that are meant for the person at the terminal."""


class UserError(Exception):
    """One line that says what is wrong, where, what was got, what was expected, and what to do."""


class UnreadableError(UserError):
    """A file of a cache that is there and cannot be read: this machine's trouble, so nothing is made anew for it."""


class WriteError(UserError):
    """A file of a cache that cannot be written: what was to be in it is made again by the next run."""


class LockedError(UserError):
    """Another latentprep is at work on a cache."""


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError if a value is not one of the choices."""
    if value not in choices:
        raise UserError(f"{option} {value}: expected one of {', '.join(choices)}.")
