"""LoRA that decays towards the adapter of the task before."""

import torch
from avalanche.training.plugins import SupervisedPlugin

from treelora_avalanche.strategies import SeqLoRA


class DecayPlugin(SupervisedPlugin):
    """Applies w <- w + decay (w_before - w) after every optimizer step."""

    def __init__(self, decay):
        super().__init__()
        self.decay = decay
        self.before = None

    def before_training_exp(self, strategy, **kwargs):
        first = strategy.clock.train_exp_counter == 0
        parameters = strategy.model.parameters()
        self.before = None if first else [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def after_update(self, strategy, **kwargs):
        for p, before in zip(strategy.model.parameters(), self.before or (), strict=False):
            p.lerp_(before, self.decay)

    def state_dict(self):
        return {}  # nothing that outlives an experience

    def load_state_dict(self, state):
        pass


class DecayLoRA(SeqLoRA):
    """LoRA that decays towards the adapter of the task before.

    :param decay: share of the way back after every optimizer step, from 0 to 1.
    """

    def __init__(self, *, model, decay: float = 0.01, plugins=None, **kwargs):
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` should be from 0 to 1, but is {decay}. Lower it.")
        super().__init__(model=model, plugins=[*(plugins or ()), DecayPlugin(decay)], **kwargs)
