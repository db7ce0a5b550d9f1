"""One Avalanche strategy per method."""

from treelora_avalanche.strategies.ewc_lora import EWCLoRA
from treelora_avalanche.strategies.frozen import FrozenGaussian, FrozenNCM
from treelora_avalanche.strategies.gem_lora import GEMLoRA
from treelora_avalanche.strategies.seq_lora import SeqLoRA
from treelora_avalanche.strategies.treelora import TreeLoRAStrategy

__all__ = ["EWCLoRA", "FrozenGaussian", "FrozenNCM", "GEMLoRA", "SeqLoRA", "TreeLoRAStrategy"]
