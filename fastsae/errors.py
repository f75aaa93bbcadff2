"""The one exception type for what a user can fix."""


class FastsaeError(ValueError):
    """A user's mistake or a broken input: names the argument, what was given, and the fix.

    The command line prints it as one line and exits with 2; it never shows a traceback.
    """
