"""State as plain files: all tensors in one safetensors file, everything else in one JSON file.

A state is a dictionary of nested dictionaries and lists, with tensors, strings, numbers, booleans
and None as leaves. Nothing is pickled, so a state of unknown origin can be read without running
its content, and any other program can read it too. A folder is written under another name and then
renamed: after an interruption at any moment, either the old state or the new one is complete.

The package also reads and writes the parts that every strategy has: an optimizer's state by the
names of its parameters, the state of the global random generators, and a fingerprint of a frozen
backbone.
"""

from treelora_avalanche.state.checks import (
    State,
    check_keys,
    check_same_settings,
    check_same_tensors,
    clone_state,
)
from treelora_avalanche.state.files import (
    FORMAT_VERSION,
    TENSOR_FILE,
    VALUE_FILE,
    has_state,
    load_state,
    save_state,
)
from treelora_avalanche.state.fingerprint import backbone_fingerprint
from treelora_avalanche.state.optimizer import (
    check_optimizer_state,
    load_optimizer_state,
    optimizer_state,
    reset_optimizer_state,
    set_parameters,
)
from treelora_avalanche.state.random_state import check_random_state, random_state, set_random_state

__all__ = [
    "FORMAT_VERSION",
    "TENSOR_FILE",
    "VALUE_FILE",
    "State",
    "backbone_fingerprint",
    "check_keys",
    "check_optimizer_state",
    "check_random_state",
    "check_same_settings",
    "check_same_tensors",
    "clone_state",
    "has_state",
    "load_optimizer_state",
    "load_state",
    "optimizer_state",
    "random_state",
    "reset_optimizer_state",
    "save_state",
    "set_parameters",
    "set_random_state",
]
