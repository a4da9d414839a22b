"""What scripts say to it when they start."""


def set_verbosity_warning() -> None:
    pass


def set_verbosity_error() -> None:
    pass
