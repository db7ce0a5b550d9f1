"""Registry of methods, scenarios and settings, which other packages extend by entry points.

A package registers a method or a scenario by a row of these tables::

    # my_package/registration.py
    from treelora_avalanche.registry import LORA, Method

    MY_METHOD = Method("my_package.strategies:MyLoRA", "LoRA with my penalty", family=LORA)

    # setup.cfg
    [options.entry_points]
    treelora_avalanche.methods =
        MyLoRA = my_package.registration:MY_METHOD

torch is not imported here, and other packages are imported on first use.
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
    Strength,
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
    "Strength",
    "check_models",
]
