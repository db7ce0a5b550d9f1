"""Bank of finished adapters, and the merging of two into one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treelora_avalanche.adapters.factors import LayerShape, LoRAFactors
from treelora_avalanche.state import check_keys


class AdapterBank:
    """Stores the finished adapters on the host; only the rows in use are copied to the device.

    Its indices are those of the :class:`~treelora_avalanche.tree.AdapterTree`::

        bank = AdapterBank()
        bank.append(LoRAFactors(model))  # after a task
        bank.request(picks)  # before the forward pass
        anchor = bank.receive()  # after the update, (n_layers, dim)
    """

    def __init__(self) -> None:
        self._storage: Tensor | None = None  # (capacity, n_layers, dim)
        self._n_adapters = 0
        self._shapes: list[LayerShape] = []
        self._exchange: _Exchange | None = None

    def __len__(self) -> int:
        return self._n_adapters

    def __getitem__(self, index: int) -> Tensor:
        """Returns the factors of one adapter, ``(n_layers, dim)``, on the host."""
        return self.factors[index]

    @property
    def factors(self) -> Tensor:
        """Factors of all adapters, ``(n_adapters, n_layers, dim)``, on the host.

        :raises IndexError: if the bank is empty.
        """
        if self._storage is None:
            raise IndexError("the bank should hold an adapter, but is empty. Append one first.")
        return self._storage[: self._n_adapters]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored adapters."""
        return self.factors.nbytes if self._n_adapters else 0

    def append(self, factors: LoRAFactors) -> None:
        """Stores a copy of the active factors as the next adapter.

        :param factors: the active factors, of the same shapes as the stored ones.
        :raises ValueError: if the shapes differ.
        """
        if self._shapes and factors.shapes != self._shapes:
            raise ValueError(
                f"`factors` should be of shapes {self._shapes}, as those in the bank, but are "
                f"{factors.shapes}. Use the same rank, layers and target_modules."
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
        """Replaces two adapters by the weighted mean of the weights that they add.

        The mean is that of the products BA, truncated to the rank (see :func:`merge_factors`).

        :param kept: index of the adapter that becomes the mean.
        :param absorbed: index of the adapter that is removed; later ones move down by one.
        :param kept_weight: share of the kept adapter in the mean, between 0 and 1.
        """
        self.average(kept, absorbed, kept_weight)
        factors = self.factors
        factors[absorbed:-1] = factors[absorbed + 1 :].clone()
        self._n_adapters -= 1

    def average(self, kept: int, other: int, kept_weight: float) -> None:
        """Replaces one adapter by its mean with another, as :meth:`merge`; the other one stays.

        :param kept: index of the adapter that becomes the mean.
        :param other: index of the other adapter.
        :param kept_weight: share of the kept adapter in the mean, between 0 and 1.
        """
        factors = self.factors
        for layer, shape in enumerate(self._shapes):
            factors[kept, layer] = merge_factors(
                factors[kept, layer], factors[other, layer], kept_weight, shape
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the adapters ``(n_adapters, n_layers, dim)``, not copied, and their shapes."""
        return {
            "factors": self.factors if self._n_adapters else None,
            "shapes": [list(shape) for shape in self._shapes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the adapters by those of a state.

        :param state: return value of :meth:`state_dict`.
        :raises ValueError: if its parts do not fit together; the bank is then unchanged.
        """
        check_keys(state, {"factors", "shapes"}, "the bank's state")
        shapes = [LayerShape(*shape) for shape in state["shapes"]]
        factors = state["factors"]
        if factors is None:
            self._storage, self._n_adapters = None, 0
        else:
            expected = (len(shapes), max((shape.size for shape in shapes), default=0))
            if factors.ndim != 3 or tuple(factors.shape[1:]) != expected:
                raise ValueError(
                    f"the adapters in the state should be {expected} for layers {shapes}, but are "
                    f"{tuple(factors.shape[1:])}. Load a state that a bank has saved."
                )
            self._storage = factors.detach().to("cpu", copy=True)
            self._n_adapters = len(factors)
        self._shapes = shapes
        self._exchange = None  # it may be made for other shapes

    def request(self, picks: Tensor) -> None:
        """Requests the factors of one adapter per layer, without waiting.

        :param picks: index of an adapter for every layer, ``(n_layers,)``, on the device.
        """
        if self._exchange is None or self._exchange.device != picks.device:
            self._exchange = _Exchange(self.factors[0], picks.device)
        self._exchange.send(picks)

    def receive(self) -> Tensor:
        """Returns the factors requested last, ``(n_layers, dim)``, on the device.

        The host waits for the picks of :meth:`request`, not for the work queued after them.
        Requested before the forward pass and received after the optimizer's step, they arrive while
        the device still has the whole step to compute, so it never idles.

        :raises RuntimeError: if nothing was requested.
        """
        if self._exchange is None:
            raise RuntimeError("nothing was requested. Call request(picks) first.")
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
    """Returns the factors of the weighted mean of two adapters of a layer, truncated to the rank.

    With w the weight of the kept adapter, ``B A = truncated SVD of w B_1 A_1 + (1 - w) B_2 A_2``:
    averaging A and B apart would mix terms that belong to neither adapter. The SVD leaves a
    rotation free, which is chosen so that the factors come closest to the kept ones: later tasks
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
