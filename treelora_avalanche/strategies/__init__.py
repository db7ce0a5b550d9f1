"""One strategy per method: TreeLoRA and its baselines."""

from treelora_avalanche.strategies.dual_prompt import DualPrompt
from treelora_avalanche.strategies.ewc_lora import EWCLoRA
from treelora_avalanche.strategies.frozen import FrozenGaussian, FrozenNCM, FrozenRanPAC
from treelora_avalanche.strategies.gem_lora import GEMLoRA
from treelora_avalanche.strategies.hide_lora import HiDeLoRA
from treelora_avalanche.strategies.hide_prompt import HiDePrompt
from treelora_avalanche.strategies.in_context import InContext
from treelora_avalanche.strategies.inf_lora import InfLoRA
from treelora_avalanche.strategies.l2_anchor import L2Anchor
from treelora_avalanche.strategies.l2p import L2P
from treelora_avalanche.strategies.o_lora import OLoRA
from treelora_avalanche.strategies.ogd import OGD
from treelora_avalanche.strategies.on_policy_replay import OnPolicyReplay
from treelora_avalanche.strategies.osf import OSF
from treelora_avalanche.strategies.ran_pac import RanPAC
from treelora_avalanche.strategies.sapt import SAPT
from treelora_avalanche.strategies.sd_lora import SDLoRA
from treelora_avalanche.strategies.seq_lora import SeqLoRA
from treelora_avalanche.strategies.slca import SLCA
from treelora_avalanche.strategies.tasl import TaSL
from treelora_avalanche.strategies.treelora import TreeLoRAStrategy

__all__ = [
    "L2P",
    "OGD",
    "OSF",
    "SAPT",
    "SLCA",
    "DualPrompt",
    "EWCLoRA",
    "FrozenGaussian",
    "FrozenNCM",
    "FrozenRanPAC",
    "GEMLoRA",
    "HiDeLoRA",
    "HiDePrompt",
    "InContext",
    "InfLoRA",
    "L2Anchor",
    "OLoRA",
    "OnPolicyReplay",
    "RanPAC",
    "SDLoRA",
    "SeqLoRA",
    "TaSL",
    "TreeLoRAStrategy",
]
