"""Computes what the frozen blocks make of a sample once, and keeps it."""

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
from avalanche.benchmarks.utils import _make_taskaware_classification_dataset
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
    """What the prefix has made of every sample of a dataset, with the samples' targets.

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
    """What is kept of a dataset."""

    dataset: Any
    hidden: Tensor
    n_blocks: int
    for_training: bool
    """Whether training sees the same images as evaluation."""

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self.hidden.untyped_storage().filename else self.hidden.nbytes


class PrefixCachePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Lets every pass over an experience start where the first trained block does.

    The blocks below it are frozen: what they make of a sample is the same in every epoch, and in
    every evaluation of the stream. Before an experience is trained or evaluated it is computed for
    all samples, and ``strategy.experience`` becomes a copy of the experience whose dataset holds it
    in place of the images or of the tokens. Loaders, shuffling, other plugins and the model take it
    as they take these, so the order of the samples is the same, and so are the weights that are
    learned: up to the precision of storage, which is that of the forward pass. In float32 on one
    CPU thread that is bit for bit for images, and for texts of one length in batches of one size.
    Else the frozen layers have seen a text in batches of other shapes, where kernels round
    differently, as they do from epoch to epoch without the cache. Of texts the padding is not kept.

    The samples of a training experience are kept while it is trained, those of an evaluation for as
    long as their dataset lives: evaluated after each of N tasks, N test sets cost N passes through
    the prefix and not N (N + 1) / 2. They are no part of the state of a strategy.

    It does nothing, and one line of the log says why, where no block is frozen below the adapter,
    where the two parts of a language model do not answer as the whole, where a sample read again
    differs (augmentation, or a transform of training that is not that of evaluation), and where the
    prefix itself is random (dropout). Samples are tried, and not all: a transform that rarely does
    anything goes unnoticed, and is a reason to switch the cache off.
    Of several processes (:class:`~treelora_avalanche.plugins.DataParallelPlugin`) each computes a
    part, and those of one machine keep it in common, in a memory-mapped file. Task labels are not
    used.

    :param memory: bytes of main memory that may be taken; what does not fit lies in memory-mapped
        files in the folder for temporary files (``$TMPDIR``), which are gone when it is let go.
        ``"auto"``: a quarter of what is available when the first experience comes. None: switched
        off.
    :raises ValueError: if ``memory`` is neither.
    """

    def __init__(self, memory: int | str | None = "auto"):
        super().__init__()
        if not (memory in ("auto", None) or (isinstance(memory, int) and memory >= 0)):
            raise ValueError(
                f"`memory` is {memory!r}; use a number of bytes, 'auto', or None for no cache."
            )
        self.memory = memory
        self._kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()  # by dataset
        self._in_training: weakref.ref[Any] | None = None
        self._said: set[str] = set()

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Puts what the prefix makes of the experience in place of its images."""
        self._let_go()
        dataset = strategy.experience.dataset
        if dataset not in self._kept:
            self._in_training = weakref.ref(dataset)
        self._replace(strategy, training=True, num_workers=kwargs.get("num_workers", 0))

    def before_eval_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """The same for an experience that is evaluated."""
        self._replace(strategy, training=False, num_workers=kwargs.get("num_workers", 0))

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Lets go of what was kept for training."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is kept can be computed again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing.

        :param state: what :meth:`state_dict` returned.
        """

    def _let_go(self) -> None:
        dataset = self._in_training and self._in_training()
        if dataset is not None:
            self._kept.pop(dataset, None)
        self._in_training = None

    def _replace(self, strategy: Any, training: bool, num_workers: int) -> None:
        view, dataset = strategy.model, strategy.experience.dataset
        if self.memory is None or len(dataset) == 0:
            return
        if not isinstance(view, SplitView):
            self._say("the model is not known in two parts")
            return
        if not view.n_frozen:
            self._say("no block is frozen below the adapter (choose layers='last:k')")
            return
        before = random_state()  # looking at samples is to change nothing
        try:
            kept = self._find(strategy, training, num_workers)
        finally:
            set_random_state(before)
        if kept is None:
            return
        self._kept[dataset] = kept
        # A copy: the benchmark's own experience keeps its images.
        strategy.experience = copy.copy(strategy.experience)
        strategy.experience._dataset = kept.dataset

    def _find(self, strategy: Any, training: bool, num_workers: int) -> _Kept | None:
        """What is kept of the current experience, computed if need be; None if it may not be."""
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
        # Nothing is read before every process has done its part.
        if not _all_agree(computed is not None, processes) or computed is None:
            return None
        return _Kept(*computed, view.n_frozen, training)

    def _of_images(
        self, strategy: Any, num_workers: int, processes: Processes | None
    ) -> tuple[Any, Tensor] | None:
        """A dataset of what the prefix makes of images, and where it lies."""
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
        targets, task_labels = list(dataset.targets), list(dataset.targets_task_labels)
        as_dataset = _make_taskaware_classification_dataset(
            HiddenStates(hidden, targets), targets=targets, task_labels=task_labels
        )
        return as_dataset, hidden

    def _of_texts(
        self, strategy: Any, num_workers: int, processes: Processes | None
    ) -> tuple[Any, Tensor] | None:
        """The same of texts, of whose rows the tokens alone are kept."""
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
                self._say("a row is not as long as `lengths` tells, or becomes NaN")
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
        """Whether the prefix seems to make the same of a sample every time."""
        rows = torch.linspace(0, len(dataset) - 1, TRIED_SAMPLES).long().unique().tolist()
        readings = [dataset.eval(), *([dataset.train()] * 2 if training else [dataset.eval()])]
        images, *again = ([part[row][0] for row in rows] for part in readings)
        on_text = isinstance(view, SplitLanguageModel)
        if not all(isinstance(x, Tensor) and x.ndim == (1 if on_text else 3) for x in images):
            self._say(f"the samples are not {'rows of tokens' if on_text else 'images'} as tensors")
            return False
        if on_text and not hasattr(dataset, "lengths"):
            self._say("the dataset does not tell the `lengths` of its rows")
            return False
        if not all(
            torch.equal(x, y) for other in again for x, y in zip(images, other, strict=True)
        ):
            self._say("a sample read again differs (random augmentation, or two transforms)")
            return False
        some = torch.stack(images[:2]).to(device)
        if isinstance(view, SplitLanguageModel):
            some = crop(some)
            if not view.agrees(crop(some[:1])):
                self._say("the layers of the model read more than what the layer below hands on")
                return False
        if view.training:
            first, second = view.frozen_output(some), view.frozen_output(some)
            if not torch.allclose(first, second, rtol=1e-2, atol=1e-2, equal_nan=True):
                self._say("the frozen blocks are random (dropout)")
                return False
        return True

    def _room(
        self, shape: tuple[int, ...], dtype: torch.dtype, processes: Processes | None
    ) -> Tensor | None:
        """Room in memory or in a file; of several processes in a file that they all see."""
        n_values = math.prod(shape)
        n_bytes = n_values * dtype.itemsize
        if self.memory == "auto":
            self.memory = psutil.virtual_memory().available // 4
        in_memory = sum(kept.bytes_in_memory for kept in self._kept.values())
        if processes is None and n_bytes + in_memory <= int(self.memory or 0):
            return torch.empty(shape, dtype=dtype)
        fits = n_bytes <= shutil.disk_usage(tempfile.gettempdir()).free
        if not fits:
            self._say(f"there is no room for {n_bytes:,} bytes, neither in memory nor on disk")
        if processes is not None:
            return processes.tensor_here(shape, dtype, fits)
        if not fits:
            return None
        # The file has no name any more when this returns; it lives as long as the mapping.
        with tempfile.NamedTemporaryFile(prefix="treelora-prefix-") as file:
            return torch.from_file(file.name, shared=True, size=n_values, dtype=dtype).view(shape)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            logger.info("what the frozen blocks compute is not kept: %s", reason)
            self._said.add(reason)


def _part(n: int, processes: Processes | None) -> list[int]:
    """Numbers of the samples that this process computes."""
    return list(range(n)) if processes is None else processes.part_here(n)


def _all_agree(opinion: bool, processes: Processes | None) -> bool:
    return opinion if processes is None else all(processes.of_all(opinion))
