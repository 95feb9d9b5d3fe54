"""The errors whose text is meant for the user."""


class UsageError(Exception):
    """Wrong input: the message says what is wrong, where, and what to do. `main` prints it and exits with 2."""


def os_error_line(error: OSError) -> str:
    """One line for what the system refused: a full disk, a folder that cannot be written."""
    where = f"{error.filename}: " if error.filename else ""
    return " ".join(f"{where}{error.strerror or error}".split())


def one_line(error: BaseException, width: int = 200) -> str:
    """The class of a library's error and the beginning of its text, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:width]
