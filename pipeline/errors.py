"""What a user is told when a run cannot go on."""


class EvenmixError(Exception):
    """An obstacle that the user can remove; its text names the file, the record and the remedy.

    The command line prints it as one line and exits with status 1.
    """
