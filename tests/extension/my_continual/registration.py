"""The rows that the command line shows. Nothing heavy is imported here."""

from treelora_avalanche.registry import LORA, VISION, Method, Scenario

DECAY_LORA = Method(
    "my_continual.strategies:DecayLoRA",
    "LoRA that decays towards the adapter of the task before",
    family=LORA,
    models=VISION,
)
NOISY_DIGITS = Scenario(
    "my_continual.streams:NoisyDigits",
    "the digits under noise, split by class",
    takes={"n_experiences", "head"},
    n_experiences=5,
    backbone="my_continual.backbones:tiny_vit",
)
