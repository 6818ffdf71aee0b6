"""Errors of runs, which commands tell in one line."""


class RunError(ValueError):
    """A run cannot go on, or its folder cannot be used as asked."""


class Quiet(Exception):
    """This rank stops because of what another rank says, or has said, to the user."""


class Interrupted(Quiet):
    """The user has stopped all ranks."""
