"""Loaders and forward passes for token sequences."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import LwFPlugin, SupervisedPlugin

from treelora_avalanche.models.token_batches import prompt_lengths, token_loader
from treelora_avalanche.models.views.routed_language import RoutedLanguageModel


class TokenBatches:
    """Mixin for strategies: batches token sequences by length, and computes only needed logits.

    Datasets without ``lengths`` are loaded as Avalanche loads them. A plugin that needs the logits
    of every position declares ``needs_all_logits = True``.
    """

    def make_train_dataloader(
        self: Any, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """Makes the loader for training on an experience.

        :param shuffle: whether the samples are shuffled.
        :param drop_last: whether an incomplete last batch is dropped.
        :param kwargs: ``num_workers``, ``pin_memory``, ``persistent_workers``.
        """
        if hasattr(self.adapted_dataset, "lengths"):
            self.dataloader = token_loader(
                self.adapted_dataset,
                self.train_mb_size,
                shuffle=shuffle,
                drop_last=drop_last,
                **_loader_options(self, **kwargs),
            )
        else:
            super().make_train_dataloader(  # type: ignore[misc]
                shuffle=shuffle, drop_last=drop_last, **kwargs
            )

    def make_eval_dataloader(self: Any, shuffle: bool = False, **kwargs: Any) -> None:
        """Makes the loader for evaluating an experience.

        :param shuffle: whether the samples are shuffled.
        :param kwargs: see :meth:`make_train_dataloader`.
        """
        if hasattr(self.adapted_dataset, "lengths"):
            self.dataloader = token_loader(
                self.adapted_dataset,
                self.eval_mb_size,
                shuffle=shuffle,
                **_loader_options(self, **kwargs),
            )
        else:
            super().make_eval_dataloader(shuffle=shuffle, **kwargs)  # type: ignore[misc]

    def forward(self: Any) -> Any:
        """Returns the logits of the current batch; for token sequences, where there are targets."""
        x, y = self.mb_x, self.mb_y
        if y.ndim == 2 and isinstance(self.model, RoutedLanguageModel) and not self.model.training:
            return self.model(x, last=y.shape[1], prompt_lengths=prompt_lengths(x, y))
        if y.ndim == 2 and y.shape[1] < x.shape[1] and not any(map(_needs_all, self.plugins)):
            return self.model(x, last=y.shape[1])
        return super().forward()  # type: ignore[misc]


def _needs_all(plugin: SupervisedPlugin) -> bool:
    # LwF compares the logits of the whole batch with those of another model.
    return bool(getattr(plugin, "needs_all_logits", isinstance(plugin, LwFPlugin)))


def _loader_options(
    strategy: Any,
    num_workers: int = 0,
    pin_memory: bool | None = None,
    persistent_workers: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """As in Avalanche: pinned on a GPU, and workers persist only where there are some."""
    options: dict[str, Any] = strategy._obtain_common_dataloader_parameters(
        num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
    )
    return options
