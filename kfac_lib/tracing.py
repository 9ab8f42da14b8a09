"""Placeholder, replaced on landing."""

from typing import Any


class Traced:
    """To come."""

    def __init__(self, *args: Any) -> None:
        raise NotImplementedError
