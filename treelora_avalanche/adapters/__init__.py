"""LoRA adapters: attach them with peft, read and write their factors, store the finished ones.

The adapter of task n is one matrix theta_n, ``(n_layers, dim)``: row ``l`` has the LoRA factors A
and B of the ``l``-th adapted weight matrix, counted from the input side. :class:`LoRAFactors` keeps
the active factors in exactly that matrix, so that every operation of TreeLoRA is one tensor
operation for all layers.
"""

from treelora_avalanche.adapters.attach import (
    AdapterHost,
    LayerChoice,
    add_lora,
    disabled_adapters,
    find_adaptable_layers,
    find_host,
    lora_defaults,
    lora_layers,
)
from treelora_avalanche.adapters.bank import AdapterBank, merge_factors
from treelora_avalanche.adapters.classifier import classifier_name, find_classifier
from treelora_avalanche.adapters.directions import PastDirections
from treelora_avalanche.adapters.factors import (
    LayerShape,
    LoRAFactors,
    SignatureSketch,
    active_factors,
)
from treelora_avalanche.adapters.folders import load_adapter, save_adapter
from treelora_avalanche.adapters.merging import merged_weights
from treelora_avalanche.adapters.past import PastAdapters
from treelora_avalanche.adapters.subspaces import SubspaceMemory, new_directions, project_off
from treelora_avalanche.adapters.trainable_view import TrainableView
from treelora_avalanche.defaults import (
    ENCODER_LORA,
    LANGUAGE_LORA,
    VISION_LORA,
    LoRADefaults,
)

__all__ = [
    "ENCODER_LORA",
    "LANGUAGE_LORA",
    "VISION_LORA",
    "AdapterBank",
    "AdapterHost",
    "LayerChoice",
    "LayerShape",
    "LoRADefaults",
    "LoRAFactors",
    "PastAdapters",
    "PastDirections",
    "SignatureSketch",
    "SubspaceMemory",
    "TrainableView",
    "active_factors",
    "add_lora",
    "classifier_name",
    "disabled_adapters",
    "find_adaptable_layers",
    "find_classifier",
    "find_host",
    "load_adapter",
    "lora_defaults",
    "lora_layers",
    "merge_factors",
    "merged_weights",
    "new_directions",
    "project_off",
    "save_adapter",
]
