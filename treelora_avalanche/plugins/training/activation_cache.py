"""Caches the output of the frozen blocks."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import tempfile
import weakref
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psutil
import torch
from avalanche.benchmarks.utils import (
    _make_taskaware_classification_dataset,
    as_classification_dataset,
)
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from treelora_avalanche.models.tokens import crop, real_tokens
from treelora_avalanche.models.views.split import SplitView
from treelora_avalanche.models.views.split_language import SplitLanguageModel
from treelora_avalanche.plugins.training.cached_tokens import HiddenRows, like, rows_of
from treelora_avalanche.processes import Processes, shared_work
from treelora_avalanche.state import random_state, set_random_state

logger = logging.getLogger(__name__)

TRIED_SAMPLES = 32


class HiddenStates(Dataset[tuple[Tensor, Any]]):
    """Dataset of frozen-block outputs, with the targets of the samples.

    >>> HiddenStates(torch.zeros(2, 5, 16), [0, 1])[1][0].shape
    torch.Size([5, 16])

    :param hidden: ``(n_samples, n_tokens, dim)``.
    :param targets: the targets, in the same order.
    """

    def __init__(self, hidden: Tensor, targets: list[Any]):
        self.hidden = hidden
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.hidden[index], self.targets[index]


class _Kept(NamedTuple):
    """Cache entry of a dataset."""

    dataset: Any
    hidden: Tensor
    n_blocks: int
    for_training: bool
    """Whether training uses the same images as evaluation."""

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self.hidden.untyped_storage().filename else self.hidden.nbytes


class ActivationCachePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Caches frozen-block activations, so that every epoch starts at the first trainable block.

    The output of the frozen blocks for a sample is the same in every epoch, and in every evaluation
    of the stream. It is computed for all samples before an experience is trained or evaluated;
    ``strategy.experience`` becomes a copy whose dataset holds activations in place of images or
    tokens. Loaders, shuffling, other plugins and the model handle them as they handle inputs, so
    the order of the samples and the learned weights are the same, up to the precision of storage,
    which is that of the forward pass. In float32 on one CPU thread they are equal bit for bit for
    images, and for texts of one length in batches of one size. Otherwise the frozen layers compute
    a text in batches of other shapes, where kernels round differently, as they do from epoch to
    epoch without the cache. Padding is not stored.

    Activations of a training experience are kept during its training, those of an evaluation as
    long as their dataset lives: with an evaluation after each of N tasks, N test sets cost N passes
    through the frozen blocks instead of N (N + 1) / 2. They are not part of the state of a
    strategy.

    The cache is skipped, with one line in the log, where no block below the adapter is frozen,
    where the two parts of a language model do not reproduce the whole, where a sample differs when
    it is read again (augmentation, or a training transform other than that of evaluation), and
    where the frozen blocks themselves are random (dropout). This is tested on some samples only: a
    transform that rarely acts goes unnoticed; switch the cache off for it. With several processes
    (:class:`~treelora_avalanche.plugins.DataParallelPlugin`) each computes a part, and those of one
    machine share it in a memory-mapped file. Task labels are not used. Example::

        strategy = Naive(SplitViT(add_lora(vit)), plugins=[ActivationCachePlugin(memory="auto")])

    :param memory: main memory budget in bytes; the rest is stored in memory-mapped files in the
        folder for temporary files (``$TMPDIR``), which vanish with the cache. ``"auto"``: a quarter
        of the memory available at the first experience. None: no cache.
    :raises ValueError: if ``memory`` is none of these.
    """

    def __init__(self, memory: int | str | None = "auto"):
        super().__init__()
        if not (memory in ("auto", None) or (isinstance(memory, int) and memory >= 0)):
            raise ValueError(
                f"`memory` should be a number of bytes, 'auto' or None, but is {memory!r}. Use "
                "None for no cache."
            )
        self.memory = memory
        self._kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()  # by dataset
        self._in_training: weakref.ref[Any] | None = None
        self._logged: set[str] = set()

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replaces the images of the experience by cached activations."""
        self._drop_training_entry()
        dataset = strategy.experience.dataset
        # A plain AvalancheDataset cannot be hashed, and is not cached.
        if type(dataset).__hash__ is not None and dataset not in self._kept:
            self._in_training = weakref.ref(dataset)
        self._replace(strategy, training=True, num_workers=kwargs.get("num_workers", 0))

    def before_eval_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replaces the images of an evaluated experience."""
        self._replace(strategy, training=False, num_workers=kwargs.get("num_workers", 0))

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Deletes the activations of the training experience."""
        self._drop_training_entry()

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the cache can be recomputed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

    def _drop_training_entry(self) -> None:
        dataset = self._in_training and self._in_training()
        if dataset is not None:
            self._kept.pop(dataset, None)
        self._in_training = None

    def _replace(self, strategy: Any, training: bool, num_workers: int) -> None:
        view, dataset = strategy.model, strategy.experience.dataset
        if self.memory is None or len(dataset) == 0:
            return
        if type(dataset).__hash__ is None:
            self._log_once("the dataset has no `targets` (as_classification_dataset adds them)")
            return
        if not isinstance(view, SplitView):
            self._log_once("the model cannot be split at a block")
            return
        if not training and view.reads_inputs:
            return
        if not view.n_frozen:
            self._log_once("no block is frozen below the adapter (choose layers='last:k')")
            return
        before = random_state()  # reading samples must not change the stream of random numbers
        try:
            kept = self._find(strategy, training, num_workers)
        finally:
            set_random_state(before)
        if kept is None:
            return
        self._kept[dataset] = kept
        # A copy, so that the benchmark's own experience keeps its images.
        strategy.experience = copy.copy(strategy.experience)
        strategy.experience._dataset = kept.dataset
        strategy.experience.uncached_dataset = dataset

    def _find(self, strategy: Any, training: bool, num_workers: int) -> _Kept | None:
        """Returns the cache entry of the experience, computed if needed; None without a cache."""
        view, dataset = strategy.model, strategy.experience.dataset
        kept = self._kept.get(dataset)
        if kept is not None and (kept.n_blocks, kept.dtype) != (view.n_frozen, view.dtype):
            kept = None
        processes = shared_work(strategy)
        if kept is None or (training and not kept.for_training):
            repeats = self._repeats(view, dataset, strategy.device, training)
            if not _all_agree(repeats, processes):
                return None
        if kept is not None:
            return kept._replace(for_training=kept.for_training or training)
        compute = self._of_texts if isinstance(view, SplitLanguageModel) else self._of_images
        computed = compute(strategy, num_workers, processes)
        # Wait until every process has computed its part.
        if not _all_agree(computed is not None, processes) or computed is None:
            return None
        return _Kept(*computed, view.n_frozen, training)

    def _of_images(
        self, strategy: Any, num_workers: int, processes: Processes | None
    ) -> tuple[Any, Tensor] | None:
        """Returns a dataset of the frozen-block outputs of images, and their tensor."""
        view, dataset = strategy.model, strategy.experience.dataset
        one = view.frozen_output(dataset.eval()[0][0].to(strategy.device)[None])
        hidden = self._room((len(dataset), *one.shape[1:]), view.dtype, processes)
        if hidden is None:
            return None
        rows, size = _part(len(dataset), processes), strategy.eval_mb_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        loader = DataLoader(
            dataset.eval(),
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=strategy.device.type == "cuda",
            collate_fn=dataset.collate_fn,
        )
        for numbers, (x, *_) in zip(batches, loader, strict=True):
            part = view.frozen_output(x.to(strategy.device, non_blocking=True))
            hidden[numbers] = part.to(hidden)
        return _like_images(dataset, hidden), hidden

    def _of_texts(
        self, strategy: Any, num_workers: int, processes: Processes | None
    ) -> tuple[Any, Tensor] | None:
        """Returns the same for token sequences, without padding."""
        view, dataset = strategy.model, strategy.experience.dataset.eval()
        lengths = list(dataset.lengths)
        one = view.frozen_output(dataset[0][0][None, :1].to(strategy.device))
        hidden = self._room((sum(lengths), one.shape[2]), view.dtype, processes)
        every_target = self._room((sum(lengths),), torch.long, processes)
        if hidden is None or every_target is None:
            return None
        rows = HiddenRows(lengths, hidden, every_target)
        for numbers, tokens, targets in rows_of(
            dataset,
            _part(len(dataset), processes),
            strategy.eval_mb_size,
            num_workers=num_workers,
            pin_memory=strategy.device.type == "cuda",
        ):
            part = view.frozen_output(tokens.to(strategy.device, non_blocking=True)).cpu()
            if real_tokens(part).sum(1).tolist() != [lengths[number] for number in numbers]:
                self._log_once("a token sequence differs from its `lengths`, or its output is NaN")
                return None
            for number, *row in zip(numbers, part, targets, strict=True):
                rows.put(number, *row)
        return like(dataset, rows), hidden

    def _repeats(
        self,
        view: SplitView,
        dataset: Any,
        device: torch.device,
        training: bool,
    ) -> bool:
        """Returns whether the frozen blocks repeat their output for the same samples."""
        rows = torch.linspace(0, len(dataset) - 1, TRIED_SAMPLES).long().unique().tolist()
        readings = [dataset.eval(), *([dataset.train()] * 2 if training else [dataset.eval()])]
        images, *again = ([part[row][0] for row in rows] for part in readings)
        on_text = isinstance(view, SplitLanguageModel)
        if not all(isinstance(x, Tensor) and x.ndim == (1 if on_text else 3) for x in images):
            self._log_once(
                f"the samples are not {'token sequences' if on_text else 'images'} as tensors"
            )
            return False
        if on_text and not hasattr(dataset, "lengths"):
            self._log_once("the dataset has no `lengths` of its token sequences")
            return False
        if not all(
            torch.equal(x, y) for other in again for x, y in zip(images, other, strict=True)
        ):
            self._log_once("a sample read again differs (random augmentation, or two transforms)")
            return False
        some = torch.stack(images[:2]).to(device)
        if not on_text and not view.agrees(some):
            self._log_once("the images have another size than the model's")
            return False
        if isinstance(view, SplitLanguageModel):
            some = crop(some)
            if not view.agrees(crop(some[:1])):
                self._log_once(
                    "the layers of the model read more than the output of the layer below"
                )
                return False
        if view.training:
            first, second = view.frozen_output(some), view.frozen_output(some)
            if not torch.allclose(first, second, rtol=1e-2, atol=1e-2, equal_nan=True):
                self._log_once("the frozen blocks are random (dropout)")
                return False
        return True

    def _room(
        self, shape: tuple[int, ...], dtype: torch.dtype, processes: Processes | None
    ) -> Tensor | None:
        """Allocates in memory or in a file; for several processes, in a file that they share."""
        n_values = math.prod(shape)
        n_bytes = n_values * dtype.itemsize
        if self.memory == "auto":
            self.memory = psutil.virtual_memory().available // 4
        in_memory = sum(kept.bytes_in_memory for kept in self._kept.values())
        if processes is None and n_bytes + in_memory <= int(self.memory or 0):
            return torch.empty(shape, dtype=dtype)
        fits = n_bytes <= shutil.disk_usage(tempfile.gettempdir()).free
        if not fits:
            self._log_once(f"{n_bytes:,} bytes fit neither in memory nor on disk")
        if processes is not None:
            return processes.tensor_here(shape, dtype, fits)
        if not fits:
            return None
        # The file is unlinked when this returns; it lives as long as the mapping.
        with tempfile.NamedTemporaryFile(prefix="treelora-activations-") as file:
            return torch.from_file(file.name, shared=True, size=n_values, dtype=dtype).view(shape)

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            logger.info("the output of the frozen blocks is not cached: %s", reason)
            self._logged.add(reason)


def _like_images(dataset: Any, hidden: Tensor) -> Any:
    """Returns a dataset of hidden states with the attributes of that of images."""
    rows = HiddenStates(hidden, list(dataset.targets))
    if not hasattr(dataset, "targets_task_labels"):
        return as_classification_dataset(rows)
    return _make_taskaware_classification_dataset(
        rows, targets=rows.targets, task_labels=list(dataset.targets_task_labels)
    )


def _part(n: int, processes: Processes | None) -> list[int]:
    """Returns the indices of the samples that this process computes."""
    return list(range(n)) if processes is None else processes.part_here(n)


def _all_agree(opinion: bool, processes: Processes | None) -> bool:
    return opinion if processes is None else all(processes.of_all(opinion))
