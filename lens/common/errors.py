"""The one exception that a user is meant to read."""


class LensError(Exception):
    """Says in one line what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with 1, or with 2 where what was asked for makes
    no sense; the dashboard shows it on a card.
    """


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in one line; its class if it says nothing."""
    text = str(error).strip().splitlines()
    return text[0].strip()[:200].rstrip(".:") if text else type(error).__name__
