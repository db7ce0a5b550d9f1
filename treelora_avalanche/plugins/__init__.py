"""Avalanche plugins: the parts of TreeLoRA, and of the other methods, for any strategy.

TreeLoRA's own modules lie in this folder, those of other methods in ``baselines``, those that are
useful to every method in ``training``.
"""

from treelora_avalanche.plugins.baselines.demonstrations import DemonstrationsPlugin
from treelora_avalanche.plugins.baselines.ewc import SampleFisherEWCPlugin
from treelora_avalanche.plugins.baselines.gem import WithinTaskGEMPlugin
from treelora_avalanche.plugins.baselines.hide import ContrastivePlugin, TaskAdaptersPlugin
from treelora_avalanche.plugins.baselines.inf_lora import InfLoRAPlugin
from treelora_avalanche.plugins.baselines.l2_anchor import L2AnchorPlugin
from treelora_avalanche.plugins.baselines.o_lora import OLoRAPlugin
from treelora_avalanche.plugins.baselines.ogd import OGDPlugin
from treelora_avalanche.plugins.baselines.on_policy_replay import OnPolicyReplayPlugin
from treelora_avalanche.plugins.baselines.osf import OSFPlugin
from treelora_avalanche.plugins.baselines.prompts import KeyLossPlugin, TaskPromptsPlugin
from treelora_avalanche.plugins.baselines.ran_pac import FirstExperienceOnlyPlugin, RidgeHeadPlugin
from treelora_avalanche.plugins.baselines.sapt import SAPTPlugin
from treelora_avalanche.plugins.baselines.sd_lora import SDLoRAPlugin
from treelora_avalanche.plugins.baselines.slca import ClassifierAlignmentPlugin
from treelora_avalanche.plugins.baselines.tasl import TaSLPlugin
from treelora_avalanche.plugins.class_statistics import ClassStatisticsPlugin
from treelora_avalanche.plugins.heads import head_plugins
from treelora_avalanche.plugins.lcb_selector import (
    LCBSelectorPlugin,
    NearestSelectorPlugin,
    RandomSelectorPlugin,
    SelectorPlugin,
)
from treelora_avalanche.plugins.merged_adapter import MergedAdapterPlugin
from treelora_avalanche.plugins.prompt_router import PromptRouterPlugin
from treelora_avalanche.plugins.router import RouterPlugin
from treelora_avalanche.plugins.sparse_update import SparseUpdatePlugin, proximal_step
from treelora_avalanche.plugins.task_adaptive_head import TaskAdaptiveHeadPlugin
from treelora_avalanche.plugins.task_start import TaskStartPlugin
from treelora_avalanche.plugins.trained_head import TrainedHeadPlugin
from treelora_avalanche.plugins.training.activation_cache import ActivationCachePlugin
from treelora_avalanche.plugins.training.cosine_schedule import CosineSchedulePlugin
from treelora_avalanche.plugins.training.data_parallel import DataParallelPlugin
from treelora_avalanche.plugins.training.finite_loss import FiniteLossPlugin, NonFiniteLossError
from treelora_avalanche.plugins.training.first_session import FirstSessionPlugin
from treelora_avalanche.plugins.training.memory_draws import MemoryDrawsPlugin
from treelora_avalanche.plugins.tree_builder import TreeBuilderPlugin
from treelora_avalanche.plugins.within_task_loss import WithinTaskLossPlugin

# Former name of ActivationCachePlugin, kept for existing code.
PrefixCachePlugin = ActivationCachePlugin

__all__ = [
    "ActivationCachePlugin",
    "ClassStatisticsPlugin",
    "ClassifierAlignmentPlugin",
    "ContrastivePlugin",
    "CosineSchedulePlugin",
    "DataParallelPlugin",
    "DemonstrationsPlugin",
    "FiniteLossPlugin",
    "FirstExperienceOnlyPlugin",
    "FirstSessionPlugin",
    "InfLoRAPlugin",
    "KeyLossPlugin",
    "L2AnchorPlugin",
    "LCBSelectorPlugin",
    "MemoryDrawsPlugin",
    "MergedAdapterPlugin",
    "NearestSelectorPlugin",
    "NonFiniteLossError",
    "OGDPlugin",
    "OLoRAPlugin",
    "OSFPlugin",
    "OnPolicyReplayPlugin",
    "PrefixCachePlugin",
    "PromptRouterPlugin",
    "RandomSelectorPlugin",
    "RidgeHeadPlugin",
    "RouterPlugin",
    "SAPTPlugin",
    "SDLoRAPlugin",
    "SampleFisherEWCPlugin",
    "SelectorPlugin",
    "SparseUpdatePlugin",
    "TaSLPlugin",
    "TaskAdaptersPlugin",
    "TaskAdaptiveHeadPlugin",
    "TaskPromptsPlugin",
    "TaskStartPlugin",
    "TrainedHeadPlugin",
    "TreeBuilderPlugin",
    "WithinTaskGEMPlugin",
    "WithinTaskLossPlugin",
    "head_plugins",
    "proximal_step",
]
