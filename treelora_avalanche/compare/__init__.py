"""Many methods and seeds side by side, on the same streams and backbones."""

from treelora_avalanche.compare.cells import Cell
from treelora_avalanche.compare.comparison import compare, train

__all__ = ["Cell", "compare", "train"]
