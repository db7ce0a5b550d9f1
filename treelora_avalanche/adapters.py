"""LoRA adapters: attach them with peft, read and write their factors, keep the finished ones.

The adapter of a task is one matrix ``(n_layers, dim)``: row ``l`` holds the LoRA factors A and B of
the ``l``-th adapted weight matrix, counted from the input side (theta_n of the specification).
:class:`LoRAFactors` lays the live factors out in exactly that matrix, so that everything TreeLoRA
does with them is one tensor operation for all layers.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

LayerChoice = str | Sequence[int]

DEFAULT_LAYERS = "last:5"
DEFAULT_TARGET_MODULES = ("qkv",)


# ---------------------------------------------------------------------------------- attaching LoRA


def find_adaptable_layers(
    model: nn.Module,
    layers: LayerChoice = DEFAULT_LAYERS,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Names of the linear layers that LoRA is to adapt, from the input side to the output side.

    :param model: a transformer whose module names number its blocks (``blocks.7.attn.qkv``).
    :param layers: which blocks: ``"first:k"``, ``"last:k"`` (all of them where there are fewer than
        k), ``"all"``, or a sequence of block numbers.
    :param target_modules: last parts of the names of the linear layers inside a block, such as
        ``("qkv", "proj", "fc1", "fc2")``; by default the fused ``qkv`` of timm's transformers.
    :return: the full module names.
    :raises ValueError: if the model has no such layers, or ``layers`` does not name blocks of it.
    """
    blocks_by_kind: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if isinstance(module, nn.Linear) and block is not None:
            blocks_by_kind.setdefault(name.split(".")[-1], {})[name] = block
    if not blocks_by_kind:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no linear layers in numbered blocks to adapt; "
            "pass a transformer such as timm's vit_base_patch16_224, or a PeftModel of your own."
        )
    wanted = DEFAULT_TARGET_MODULES if target_modules is None else tuple(target_modules)
    for kind in wanted:
        if kind not in blocks_by_kind:
            raise ValueError(
                f"`target_modules` names {kind!r}, which no linear layer of the model's blocks is "
                f"called{_nearest(kind, blocks_by_kind)}. Known: {', '.join(blocks_by_kind)}."
            )
    candidates = {name: block for kind in wanted for name, block in blocks_by_kind[kind].items()}
    chosen = _choose_blocks(layers, sorted(set(candidates.values())))
    order = [name for name, _ in model.named_modules()]
    return sorted((n for n, block in candidates.items() if block in chosen), key=order.index)


def _choose_blocks(layers: LayerChoice, blocks: list[int]) -> set[int]:
    if isinstance(layers, str):
        if layers == "all":
            return set(blocks)
        match = re.fullmatch(r"(first|last):([1-9]\d*)", layers)
        if match is None:
            raise ValueError(
                f"`layers` is {layers!r}{_nearest(layers, ('first:5', 'last:5', 'all'))}. "
                "Use 'first:k', 'last:k' (k at least 1), 'all', or a list of block numbers."
            )
        k = int(match[2])
        return set(blocks[:k] if match[1] == "first" else blocks[-k:])
    unknown = [block for block in layers if block not in blocks]
    if unknown or not layers:
        raise ValueError(
            f"`layers` is {list(layers)}; it must name at least one block, and the model's blocks "
            f"are {blocks[0]} to {blocks[-1]}."
        )
    return set(layers)


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def add_lora(
    model: nn.Module,
    *,
    layers: LayerChoice = DEFAULT_LAYERS,
    rank: int = 10,
    alpha: float = 10,
    target_modules: Sequence[str] | None = None,
) -> PeftModel:
    """Freeze a pretrained model and attach LoRA to the chosen layers, by peft.

    The classifier, where the model has one, is trained beside the adapter and saved with it.

    :param model: the pretrained model; it is changed in place, after all arguments were checked.
    :param layers: see :func:`find_adaptable_layers`.
    :param rank: rank of the factors A ``(rank, in)`` and B ``(out, rank)``.
    :param alpha: the adapter's output is scaled by ``alpha / rank``.
    :param target_modules: see :func:`find_adaptable_layers`.
    :return: the peft model around ``model``.
    :raises ValueError: if an argument is out of range or names no layer of the model.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, and is {rank}.")
    if alpha <= 0:
        raise ValueError(f"`alpha` must be positive, and is {alpha}.")
    names = find_adaptable_layers(model, layers, target_modules)
    classifier = _classifier_name(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r: any number does
        target_modules=names,
        modules_to_save=[classifier] if classifier else None,
    )
    # peft asks for one of transformers' models, and any module will do.
    return get_peft_model(model, config)  # type: ignore[arg-type, return-value, unused-ignore]


def _classifier_name(model: nn.Module) -> str | None:
    """Where the classifier hangs in the model: timm tells; else the usual names are tried."""
    get_classifier = getattr(model, "get_classifier", None)
    head: object = get_classifier() if callable(get_classifier) else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return str(name)
    usual = ("classifier", "score", "head", "fc")
    return next((n for n in usual if isinstance(getattr(model, n, None), nn.Linear)), None)


def classifier_outputs(model: nn.Module) -> int | None:
    """Number of outputs of the classifier that is trained beside the adapter; None without one."""
    heads = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    outputs = (getattr(head.original_module, "out_features", None) for head in heads)
    return next((n for n in outputs if isinstance(n, int)), None)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by name, from the input side to the output side."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


# ------------------------------------------------------------------------- the trainable-only view


class TrainableView(nn.Module):
    """A model seen through its trainable parameters alone.

    ``parameters()`` and ``named_parameters()`` yield only what requires a gradient, and a deep copy
    shares the frozen tensors and buffers. So strategies that keep something per parameter (EWC, SI,
    GEM) or copy the model (LwF) cost the size of the adapter and not that of the backbone.

    :param module: the model, usually a :class:`peft.PeftModel`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what is trained; see :meth:`torch.nn.Module.named_parameters`."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableView:
        shared = [p for p in self.module.parameters() if not p.requires_grad]
        memo.update((id(tensor), tensor) for tensor in (*shared, *self.module.buffers()))
        twin = type(self)(copy.deepcopy(self.module, memo))
        twin.training = self.training
        return twin


# ---------------------------------------------------------------------- the factors as one matrix


class LayerShape(NamedTuple):
    """Shapes of one layer's factors: A is ``(rank, n_in)`` and B ``(n_out, rank)``."""

    rank: int
    n_in: int
    n_out: int

    @property
    def size(self) -> int:
        """Number of values in A and B together."""
        return self.rank * (self.n_in + self.n_out)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A ``(rank, n_in)`` and B ``(n_out, rank)`` in a row ``(dim,)`` of the matrix."""
        n_a = self.rank * self.n_in
        return (
            row[:n_a].view(self.rank, self.n_in),
            row[n_a : self.size].view(self.n_out, self.rank),
        )


class LoRAFactors:
    """The live LoRA factors of a model as one tensor ``(n_layers, dim)``, without copies.

    The parameters become views into :attr:`stack`: what the optimizer writes is seen there, and
    what is written there is what the model computes with. Layers with fewer than ``dim`` values
    are padded with zeros. Two of these on the same model share one stack.

    :param model: a model that carries LoRA layers of peft.
    :raises ValueError: if it carries none.
    """

    def __init__(self, model: nn.Module):
        layers = lora_layers(model)
        if not layers:
            raise ValueError(
                f"`model` ({type(model).__name__}) carries no LoRA layers; attach them first with "
                "treelora_avalanche.adapters.add_lora(model)."
            )
        self.names = list(layers)
        self.parameters: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.shapes: list[LayerShape] = []
        for layer in layers.values():
            adapter = layer.active_adapters[0]
            a = layer.lora_A[adapter].get_parameter("weight")
            b = layer.lora_B[adapter].get_parameter("weight")
            self.parameters.append((a, b))
            self.shapes.append(LayerShape(a.shape[0], a.shape[1], b.shape[0]))
        self.dim = max(shape.size for shape in self.shapes)
        self.stack: Tensor = self._shared_stack()

    def _shared_stack(self) -> Tensor:
        first = self.parameters[0][0].data
        storage = first.untyped_storage()
        stack = first.new_empty(0)
        if storage.nbytes() == len(self.shapes) * self.dim * first.element_size():
            stack.set_(storage, 0, (len(self.shapes), self.dim))  # type: ignore[call-overload]
            if all(p.data_ptr() == v.data_ptr() for p, v in self._parameters_and_views(stack)):
                return stack
        stack = first.new_zeros(len(self.shapes), self.dim)  # (n_layers, dim)
        for parameter, view in self._parameters_and_views(stack):
            view.copy_(parameter.data)
            parameter.data = view
        return stack

    def _parameters_and_views(self, stack: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for row, shape, pair in zip(stack, self.shapes, self.parameters, strict=True):
            yield from zip(pair, shape.split(row), strict=True)


class SignatureSketch:
    """A fixed random sample of every layer's coordinates, which stands for the whole layer.

    The L1 distance over a uniform sample of coordinates, divided by the sampled share, is an
    unbiased estimate of the L1 distance over all of them, and reading it costs ``size`` numbers per
    layer whatever the size of the layer. ``benchmarks/signature_sketch.py`` compares it with random
    projections.

    :param shapes: the shapes of the layers' factors.
    :param size: number of coordinates per layer (all of them in a smaller layer).
    :param seed: seed of the sample; equal seeds give equal samples.
    :param device: where the factors live.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        size: int = 256,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        size = min(size, *(shape.size for shape in shapes))
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randperm(s.size, generator=generator)[:size].sort().values for s in shapes]
        self.coordinates = torch.stack(rows).to(device)  # (n_layers, size)

    def __call__(self, factors: Tensor) -> Tensor:
        """Sketch of factors ``(n_layers, dim)``: a new tensor ``(n_layers, size)``."""
        return factors.gather(1, self.coordinates)

    def direction(self, factors: Tensor, start: Tensor) -> Tensor:
        """Signature of a task: the direction in which its training moved the adapter.

        :param factors: the factors now, ``(n_layers, dim)``.
        :param start: the *sketch* of the factors at the start of the task, ``(n_layers, size)``.
        :return: displacement divided by its L1 norm, ``(n_layers, size)``; 0 where nothing moved.
        """
        return nn.functional.normalize(self(factors) - start, p=1.0, dim=1)


# ------------------------------------------------------------------------------- finished adapters


class AdapterBank:
    """Copies of the finished adapters, on the host; only the rows in use go to the device.

    Adapter ``i`` of the bank is adapter ``i`` of the :class:`~treelora_avalanche.tree.AdapterTree`.
    """

    def __init__(self) -> None:
        self._storage: Tensor | None = None  # (capacity, n_layers, dim)
        self._n_adapters = 0
        self._shapes: list[LayerShape] = []
        self._exchange: _Exchange | None = None

    def __len__(self) -> int:
        return self._n_adapters

    def __getitem__(self, index: int) -> Tensor:
        """Factors of one adapter, ``(n_layers, dim)``, on the host."""
        return self.factors[index]

    @property
    def factors(self) -> Tensor:
        """Factors of all adapters, ``(n_adapters, n_layers, dim)``, on the host.

        :raises IndexError: if the bank is empty.
        """
        if self._storage is None:
            raise IndexError("the bank holds no adapter yet")
        return self._storage[: self._n_adapters]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored adapters."""
        return self.factors.nbytes if self._n_adapters else 0

    def append(self, factors: LoRAFactors) -> None:
        """Store a copy of the live factors as the next adapter.

        :param factors: the live factors; their shapes must be those of the adapters before.
        :raises ValueError: if the shapes differ.
        """
        if self._shapes and factors.shapes != self._shapes:
            raise ValueError(
                f"an adapter of layers {factors.shapes} does not fit a bank of {self._shapes}."
            )
        self._shapes = list(factors.shapes)
        stack = factors.stack
        if self._storage is None or len(self._storage) == self._n_adapters:
            # Doubling keeps the copying per task constant on average.
            capacity = max(8, 2 * self._n_adapters)
            grown = torch.empty(capacity, *stack.shape, dtype=stack.dtype)
            if self._storage is not None:
                grown[: self._n_adapters] = self._storage
            self._storage = grown
        self._storage[self._n_adapters] = stack.detach()
        self._n_adapters += 1

    def merge(self, kept: int, absorbed: int, kept_weight: float) -> None:
        """Replace two adapters by one, their weighted mean in the weights that they add.

        The mean is taken of the products BA, and cut back to the rank (see :func:`merge_factors`).

        :param kept: index of the adapter that becomes the mean.
        :param absorbed: index of the adapter that goes; later ones move down by one.
        :param kept_weight: share of the kept adapter in the mean, between 0 and 1.
        """
        factors = self.factors
        for layer, shape in enumerate(self._shapes):
            factors[kept, layer] = merge_factors(
                factors[kept, layer], factors[absorbed, layer], kept_weight, shape
            )
        factors[absorbed:-1] = factors[absorbed + 1 :].clone()
        self._n_adapters -= 1

    def request(self, picks: Tensor) -> None:
        """Ask for the factors of one adapter per layer; returns at once.

        :param picks: index of an adapter for every layer, ``(n_layers,)``, on the device.
        """
        if self._exchange is None or self._exchange.device != picks.device:
            self._exchange = _Exchange(self.factors[0], picks.device)
        self._exchange.send(picks)

    def receive(self) -> Tensor:
        """The factors asked for last, ``(n_layers, dim)``, on the device.

        The host waits for the picks of :meth:`request`, not for the work queued after them. Asked
        for before the forward pass and received after the optimizer's step, they arrive while the
        device still has the whole step before it, so it never runs dry.

        :raises RuntimeError: if nothing was asked for.
        """
        if self._exchange is None:
            raise RuntimeError("nothing was asked for: call request(picks) first")
        return self._exchange.receive(self.factors)


class _Exchange:
    """Carries picks from the device to the host, and the picked rows back."""

    def __init__(self, like: Tensor, device: torch.device):
        self.device = device
        on_host = device.type == "cpu"
        n_layers = len(like)
        self._arrived = None if on_host else torch.Event(device)
        self._layers = torch.arange(n_layers)
        self._picks = torch.empty(n_layers, dtype=torch.long, pin_memory=not on_host)
        self._rows = torch.empty(like.shape, dtype=like.dtype, pin_memory=not on_host)
        self._on_device = self._rows if on_host else torch.empty_like(self._rows, device=device)

    def send(self, picks: Tensor) -> None:
        self._picks.copy_(picks, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def receive(self, factors: Tensor) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        rows = self._picks * len(self._layers) + self._layers
        torch.index_select(factors.flatten(0, 1), 0, rows, out=self._rows)
        if self._on_device is not self._rows:
            self._on_device.copy_(self._rows, non_blocking=True)
        return self._on_device


def merge_factors(kept: Tensor, absorbed: Tensor, kept_weight: float, shape: LayerShape) -> Tensor:
    """Factors of the weighted mean of two adapters of a layer, cut back to the rank.

    The mean is that of the products BA, whose best approximation of the rank comes from a truncated
    SVD; averaging A and B apart would mix terms that belong to neither adapter. The SVD leaves a
    rotation free, and it is chosen so that the factors come closest to the kept ones: later tasks
    are compared with them value by value.

    :param kept: row ``(dim,)`` of the first adapter.
    :param absorbed: row ``(dim,)`` of the second.
    :param kept_weight: share of the first, between 0 and 1.
    :param shape: shapes of the layer's factors.
    :return: row ``(dim,)``.
    """
    a_kept, b_kept = shape.split(kept)
    a_absorbed, b_absorbed = shape.split(absorbed)
    a = torch.cat((a_kept, a_absorbed))  # (2 rank, n_in)
    b = torch.cat((kept_weight * b_kept, (1 - kept_weight) * b_absorbed), 1)  # (n_out, 2 rank)
    # Both factors are thin, so the product of their triangular parts has the same singular values.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[: shape.rank].sqrt()
    merged_b = q_b @ u[:, : shape.rank] * root  # (n_out, rank)
    merged_a = root[:, None] * (vh[: shape.rank] @ q_a.T)  # (rank, n_in)
    # Orthogonal Procrustes: the rotation R for which R A and B R^T are nearest to the kept factors.
    left, _, right = torch.linalg.svd(a_kept @ merged_a.T + b_kept.T @ merged_b)
    rotation = left @ right
    merged = torch.zeros_like(kept)
    row_a, row_b = shape.split(merged)
    row_a.copy_(rotation @ merged_a)
    row_b.copy_(merged_b @ rotation.T)
    return merged


# --------------------------------------------------------------------------------- peft folders


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the live adapter, and the classifier trained with it, as a folder that peft loads.

    The folder is written beside its place and then renamed, so it is there whole or not at all.

    :param model: a model that is, or wraps, a :class:`peft.PeftModel`.
    :param folder: where to; an adapter that is already there is replaced.
    :raises ValueError: if there is no :class:`peft.PeftModel` in the model.
    """
    peft_model = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if peft_model is None:
        raise ValueError(f"`model` ({type(model).__name__}) is no peft model; nothing to save.")
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    peft_model.save_pretrained(str(unfinished))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Put a saved adapter on a pretrained model, to be trained on or evaluated.

    :param model: the pretrained model that the adapter was trained on.
    :param folder: what :func:`save_adapter`, or peft, has written.
    :return: the peft model around ``model``.
    :raises FileNotFoundError: if the folder holds no adapter.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: adapter_config.json is missing.")
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
