"""The one exception that a user is meant to read."""


class LensError(Exception):
    """Says in one line what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with 1, or with 2 where what was asked for makes
    no sense; the dashboard shows it on a card.
    """
