"""The one exception for what a user can put right."""


class LropeError(Exception):
    """A mistake in a file or an option, said in one line: ``<file or option>: <what is wrong>; <what to do>``.

    The command line prints it and exits with status 1. Whatever raises it leaves every file as it was.
    """
