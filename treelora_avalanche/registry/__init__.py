"""Everything the command line knows, and how other packages add to it.

A package of yours registers a method or a scenario with a row of these tables::

    # my_package/registration.py
    from treelora_avalanche.registry import LORA, Method

    MY_METHOD = Method("my_package.strategies:MyLoRA", "LoRA, but mine", family=LORA)

    # setup.cfg
    [options.entry_points]
    treelora_avalanche.methods =
        MyLoRA = my_package.registration:MY_METHOD

Nothing heavy is imported here, and nothing of other packages before it is used.
"""

from treelora_avalanche.registry.entry_points import RegistrationError
from treelora_avalanche.registry.families import (
    AVALANCHE,
    EVERY_WEIGHT,
    FROZEN,
    LORA,
    PROMPTS,
    UPPER_BOUND,
    Family,
    Rates,
)
from treelora_avalanche.registry.methods import (
    BOTH,
    LANGUAGE,
    METHODS,
    VISION,
    Method,
    check_models,
)
from treelora_avalanche.registry.scenarios import SCENARIOS, Scenario
from treelora_avalanche.registry.settings import RunSettings

__all__ = [
    "AVALANCHE",
    "BOTH",
    "EVERY_WEIGHT",
    "FROZEN",
    "LANGUAGE",
    "LORA",
    "METHODS",
    "PROMPTS",
    "SCENARIOS",
    "UPPER_BOUND",
    "VISION",
    "Family",
    "Method",
    "Rates",
    "RegistrationError",
    "RunSettings",
    "Scenario",
    "check_models",
]
