"""RanPAC after a first session (McDonnell et al., NeurIPS 2023, arXiv 2307.02251)."""

from __future__ import annotations

from collections.abc import Sequence

from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from typing_extensions import Unpack

from treelora_avalanche.adapters import TrainableView
from treelora_avalanche.models.features.random_projection import (
    check_projections,
    project_classifier,
)
from treelora_avalanche.plugins import WithinTaskLossPlugin
from treelora_avalanche.plugins.baselines.ran_pac import FirstExperienceOnlyPlugin, RidgeHeadPlugin
from treelora_avalanche.strategies.base.arguments import OwnHeadLoRAOptions, check_image_model
from treelora_avalanche.strategies.seq_lora import SeqLoRA


class RanPAC(SeqLoRA):
    """Ridge classifier on randomly projected features, after LoRA on the first experience.

    LoRA and a linear classifier are trained on the first experience, with the loss over its
    classes; the backbone is then frozen. The classifier of all classes is set in closed form after
    every experience, see :class:`~treelora_avalanche.plugins.RidgeHeadPlugin`, and later
    experiences cost one pass over their images. :class:`FrozenRanPAC` does without the first
    session. (The paper adapts by AdaptFormer, SSF or VPT, not by LoRA.) Stores
    ``n_projections * (n_projections + n_classes)`` values. Task labels are not used.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        strategy = RanPAC(model, n_projections=10_000, layers="all")

    A saved adapter holds this classifier, and loads onto a model with one of the same size, see
    :func:`~treelora_avalanche.models.features.random_projection.project_classifier`.

    :param model: a pretrained image model with a linear classifier, see :class:`SeqLoRA`.
    :param n_projections: number of random projections; the paper's is 10000.
    :param seed: seed of the projections and of the held-out samples.
    :param plugins: further plugins; the list is copied.
    :param kwargs: the arguments of :class:`SeqLoRA` without ``head``, which is the method's own.
    :raises ValueError: if an argument is out of range, or the model has no linear classifier; it is
        then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_projections: int = 5000,
        seed: int = 0,
        plugins: Sequence[SupervisedPlugin] | None = None,
        **kwargs: Unpack[OwnHeadLoRAOptions],
    ):
        check_projections(n_projections)
        if isinstance(model, TrainableView):
            model = model.module  # its classifier is replaced
        check_image_model(model, "RanPAC")
        self._projections = (n_projections, seed)
        own = [WithinTaskLossPlugin(), RidgeHeadPlugin(seed), FirstExperienceOnlyPlugin()]
        super().__init__(model=model, plugins=[*(plugins or ()), *own], **kwargs)

    def _view(self, model: nn.Module) -> TrainableView:
        project_classifier(model, *self._projections)
        return super()._view(model)
