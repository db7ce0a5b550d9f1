"""One Avalanche strategy per method."""

from treelora_avalanche.strategies.seq_lora import SeqLoRA
from treelora_avalanche.strategies.treelora import TreeLoRAStrategy

__all__ = ["SeqLoRA", "TreeLoRAStrategy"]
