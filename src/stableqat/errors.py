"""The one exception that means: the input is wrong, and here is the remedy.

The command line turns it into a single line on stderr and exit code 2; every other
exception is a fault of the program and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in a user's configuration, file or argument.

    The message is one line: what is wrong (with the key, file or layer) and what to do.
    """
