"""Comparisons: methods × seeds, on the same streams and backbones. Example::

from treelora_avalanche.compare import compare
from treelora_avalanche.registry import RunSettings

cells = compare(["TreeLoRA", "SeqLoRA"], [0, 1, 2], RunSettings(), "runs/compare")
"""

from treelora_avalanche.compare.cells import Cell
from treelora_avalanche.compare.comparison import compare, earlier_results, train
from treelora_avalanche.compare.grid import expand_options

__all__ = ["Cell", "compare", "earlier_results", "expand_options", "train"]
