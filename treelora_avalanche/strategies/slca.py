"""SLCA: slow learner with classifier alignment (Zhang et al., ICCV 2023, arXiv 2303.05118)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.adapters.classifier import classifier_of
from treelora_avalanche.models.views.split_vit import trainable_view
from treelora_avalanche.plugins.baselines.slca import ClassifierAlignmentPlugin
from treelora_avalanche.strategies.base.arguments import OwnHeadOptions, check_image_model
from treelora_avalanche.strategies.base.defaults import VISION, OptimizerFactory
from treelora_avalanche.strategies.base.parameter_efficient import (
    ParameterEfficientStrategy,
    check_training,
)


class SLCA(ParameterEfficientStrategy):
    """Full fine-tuning with a small learning rate for the backbone, and an aligned classifier.

    All weights are trained, those of the backbone at ``backbone_rate`` times the learning rate of
    the classifier. After every task the classifier is trained on features drawn from the class
    Gaussians, see :class:`~treelora_avalanche.plugins.ClassifierAlignmentPlugin`. (The paper uses
    SGD; the default here is Adam, as for all methods.) Stores per class its mean and at most 64
    directions of its covariance. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = SLCA(model, lr=0.005, backbone_rate=0.01)

    :param model: a pretrained image model with a linear classifier.
    :param backbone_rate: learning rate of the backbone over that of the classifier; 0.01 in the
        paper.
    :param temperature: τ of the logit normalisation in the alignment; 0.1 in the paper.
    :param seed: seed of the drawn features.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of
        :class:`~treelora_avalanche.strategies.base.parameter_efficient.ParameterEfficientStrategy`
        without ``head``, which is the method's own; an ``optimizer`` is a callable.
    :raises ValueError: if an argument is out of range, or the model has no linear classifier; the
        model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backbone_rate: float = 0.01,
        temperature: float = 0.1,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[OwnHeadOptions],
    ):
        if not 0 < backbone_rate <= 1:
            raise ValueError(
                f"`backbone_rate` should be above 0 and at most 1, but is {backbone_rate}. The "
                "paper's is 0.01."
            )
        alignment = ClassifierAlignmentPlugin(temperature, seed=seed)
        if isinstance(model, TrainableView):
            model = model.module
        check_image_model(model, "SLCA")
        check_training(model, plugins=plugins, **kwargs)
        options: dict[str, Any] = {**kwargs}
        make = options.pop("optimizer", None) or VISION.optimizer(options.pop("lr", None))
        if isinstance(make, Optimizer):
            raise ValueError(
                "`optimizer` should be a callable that makes one from groups of parameters, but is "
                f"a {type(make).__name__}. Pass functools.partial({type(make).__name__}, lr=...)."
            )
        model.requires_grad_(True)
        head = classifier_of(model)
        super().__init__(
            model=trainable_view(model),
            optimizer=partial(_two_rates, make, head, backbone_rate),
            plugins=[*(plugins or ()), alignment],
            **options,
        )


def _two_rates(
    make: OptimizerFactory, head: nn.Linear, rate: float, parameters: Iterable[nn.Parameter]
) -> Optimizer:
    """Makes an optimizer with one group for the classifier, and one with a lower rate."""
    of_head = [id(p) for p in head.parameters()]
    backbone = [p for p in parameters if id(p) not in of_head]
    groups: Any = [{"params": list(head.parameters())}, {"params": backbone}]
    optimizer = make(groups)
    optimizer.param_groups[1]["lr"] *= rate
    return optimizer
