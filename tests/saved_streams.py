"""Strategies whose stream is saved and continued, for the tests of ``checkpoint``."""

import random

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
)
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from treelora_avalanche.metrics import continual_metrics
from treelora_avalanche.state import clone_state, save_state
from treelora_avalanche.strategies import (
    L2P,
    DualPrompt,
    EWCLoRA,
    GEMLoRA,
    HiDeLoRA,
    HiDePrompt,
    SeqLoRA,
    TreeLoRAStrategy,
)
from treelora_avalanche.testing import tiny_benchmark, tiny_vit

VARIANTS = {
    "SeqLoRA": (SeqLoRA, {}),
    "lcb": (TreeLoRAStrategy, {"selection": "lcb"}),
    "nearest": (TreeLoRAStrategy, {"selection": "nearest"}),
    "random": (TreeLoRAStrategy, {"selection": "random"}),
    "merging": (TreeLoRAStrategy, {"selection": "lcb", "max_adapters": 1}),
    "task-adaptive head": (TreeLoRAStrategy, {"head": "task_adaptive"}),
    "last": (TreeLoRAStrategy, {"head": "task_adaptive", "inference": "last"}),
    "routed": (TreeLoRAStrategy, {"head": "task_adaptive", "inference": "routed"}),
    "EWC online": (EWCLoRA, {"ewc_lambda": 5.0}),
    "EWC separate": (EWCLoRA, {"mode": "separate"}),
    "GEM": (GEMLoRA, {"patterns_per_experience": 5}),
    "L2P": (L2P, {}),
    "DualPrompt": (
        DualPrompt,
        {"general_layers": [0], "expert_layers": [1, 2], "head": "task_adaptive"},
    ),
    "HiDePrompt": (HiDePrompt, {"prompt_layers": [0, 1]}),
    "HiDeLoRA": (HiDeLoRA, {}),
    "SGD": (SeqLoRA, {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)}),
}


class Picks(SupervisedPlugin):
    """Records the picks of the selector; draws from all generators, as an augmentation would."""

    def __init__(self):
        super().__init__()
        self.picks = []

    def after_training_iteration(self, strategy, **kwargs):
        random.gauss(0, 1)
        np.random.randn()
        selector = getattr(strategy, "selector", None)
        if selector is not None and selector.picks is not None:
            self.picks.append(selector.picks.tolist())

    def state_dict(self):
        return {"picks": self.picks}

    def load_state_dict(self, state):
        self.picks = list(state["picks"])


def make(variant, model, seed=1, **options):
    strategy_class, own = VARIANTS[variant]
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    evaluator = EvaluationPlugin(
        continual_metrics(),
        accuracy_metrics(experience=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True, stream=True),
        forward_transfer_metrics(experience=True, stream=True),
        loggers=[],
    )
    options = {"train_epochs": 2, "evaluator": evaluator, **own, **options}
    return strategy_class(
        model,
        plugins=[Picks(), *options.pop("plugins", ())],
        train_mb_size=8,
        eval_every=0,
        **options,
    )


def train(strategy, benchmark, *experiences):
    for index in experiences:
        # Evaluates before and after, which the metrics of forward transfer need.
        strategy.train(benchmark.train_stream[index], eval_streams=[benchmark.test_stream])
        results = strategy.eval(benchmark.test_stream)
    return results


def outcome(strategy):
    state = clone_state(strategy.state_dict())
    state["matrix"] = strategy.evaluator.metrics[0].matrix()
    return state


def fresh(variant, tiny_vit, **options):
    """A strategy as in a new process: other random factors, another random head."""
    model = tiny_vit()
    nn.init.normal_(model.head.weight)
    return make(variant, model, seed=99, **options)


def continue_streams(root, variants):
    """Trains the last task of saved streams, and saves the outcomes; for a new process."""
    benchmark = tiny_benchmark()
    for variant in variants:
        resumed = fresh(variant, tiny_vit)
        resumed.load(root / variant)
        train(resumed, benchmark, 2)
        save_state(root / f"{variant}-outcome", outcome(resumed))
