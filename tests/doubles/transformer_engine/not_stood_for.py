"""What the double says of what it does not do; the original has no such module."""


class NotStoodFor(NotImplementedError):
    """The original may well do this. The double does not pretend to know what comes out."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the double of Transformer Engine does not stand for {what}")


def refuse(**settings: object) -> None:
    """Raise if one of these settings is used."""
    for name, value in settings.items():
        if value:
            raise NotStoodFor(f"{name}={value!r}")
