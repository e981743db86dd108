"""The network's attention blocks, as the benchmarks of attention take them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

HEADS, HEAD_SIZE = 6, 30
BAR = 5e-3
"""Largest ‖a − b‖ / ‖b‖ against FP64, where plain FP16 logits lie; ways above are not compared."""


@dataclass(frozen=True)
class Block:
    """A block of the network: side × side tokens."""

    side: int
    window: int
    shift: int
    batch: int

    @property
    def name(self) -> str:
        """What tables and files call it."""
        shifted = f"shift {self.shift}" if self.shift else "unshifted"
        return f"{self.side}×{self.side}, window {self.window}, {shifted}, batch {self.batch}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of q, k, v and y."""
        return (self.batch, self.side, self.side, HEADS * HEAD_SIZE)

    @property
    def flop(self) -> float:
        """Of the two products."""
        return 4.0 * self.batch * self.side**2 * self.window**2 * HEADS * HEAD_SIZE

    @property
    def bytes(self) -> float:
        """q, k, v and y in FP16 and the map of valid tokens, each once."""
        tokens = self.batch * self.side**2
        return tokens * (4 * 2 * HEADS * HEAD_SIZE + 1)


def blocks(batches: list[int]) -> list[Block]:
    """Every shape of the network's blocks; the grid of one window is never shifted."""
    cuts = [(64, 8, 0), (64, 8, 4), (32, 16, 0), (32, 16, 8), (16, 16, 0)]
    return [Block(*cut, batch) for batch, cut in itertools.product(batches, cuts)]


def count_of_sets(block: Block, cache: int) -> int:
    """How many inputs are together larger than twice the cache; at most 256."""
    return max(16, min(256, 1 + int(2 * cache / block.bytes)))
