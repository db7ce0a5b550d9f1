"""K-D tree of task adapters, split by their signatures (TreeLoRA, Section 3.1)."""

from treelora_avalanche.tree.adapter_tree import MAX_DEPTH, AdapterTree
from treelora_avalanche.tree.flat import FlatTree
from treelora_avalanche.tree.nodes import Merge, Node
from treelora_avalanche.tree.splits import SPLITS, closest_pair, principal_direction, threshold

__all__ = [
    "MAX_DEPTH",
    "SPLITS",
    "AdapterTree",
    "FlatTree",
    "Merge",
    "Node",
    "closest_pair",
    "principal_direction",
    "threshold",
]
