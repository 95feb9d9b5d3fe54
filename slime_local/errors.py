"""The error whose text is meant for the user."""


class UsageError(Exception):
    """Wrong input: the message says what is wrong, where, and what to do. `main` prints it and exits with 2."""
