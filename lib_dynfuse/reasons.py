"""What an exception says, for a sentence of ours."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, without a full stop; its kind, where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


__all__ = ["first_line"]
