"""What the contract's checks build."""

from my_continual.strategies import DecayLoRA


def make(model):
    return DecayLoRA(model=model, train_mb_size=8, train_epochs=2, evaluator=None)
