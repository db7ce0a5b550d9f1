"""Strategies whose batches of rows of tokens hold samples of similar length."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import LwFPlugin

from treelora_avalanche.models.token_batches import token_loader


class TokenBatches:
    """Mixin for strategies: rows of tokens come in batches of similar length.

    Datasets without ``lengths`` are loaded as Avalanche loads them.
    """

    def make_train_dataloader(
        self: Any, shuffle: bool = True, drop_last: bool = False, **kwargs: Any
    ) -> None:
        """The loader of an experience that is trained.

        :param shuffle: whether the samples are shuffled.
        :param drop_last: whether to leave out a batch that is not full.
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
        """The loader of an experience that is evaluated.

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
        """The answer to the current batch; of a language model, where there are targets alone."""
        x, y = self.mb_x, self.mb_y
        # LwF compares these logits with those of another model for the whole of the batch.
        compared = any(isinstance(plugin, LwFPlugin) for plugin in self.plugins)
        if y.ndim == 2 and y.shape[1] < x.shape[1] and not compared:
            return self.model(x, last=y.shape[1])
        return super().forward()  # type: ignore[misc]


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
