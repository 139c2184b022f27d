"""Answers that are kept."""

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
MOST = 1 << 14


class Kept(dict[K, V], Generic[K, V]):
    """What a function answers, by its argument: `kept[x]` is function(x), made once. When there are too many, it begins anew."""

    def __init__(self, function: Callable[[K], V], most: int = MOST) -> None:
        super().__init__()
        self.function, self.most = function, most

    def __missing__(self, argument: K) -> V:
        if len(self) >= self.most:
            self.clear()
        found = self[argument] = self.function(argument)
        return found
