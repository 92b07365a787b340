"""Statistics of the data for the one-pass solver.

They are sums over tokens, so that any worker can collect its part and the parts are added up.

Shapes: N tokens, D input features, O output features, L columns (L = D for exact second moments).
"""

import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class InputMoments:
    """Second moments of the inputs of one module over the tokens of one set, each with its weight.

    In the exact form `sum_DL` is sum x x^T, D x D. In the low-memory form, for wide inputs, it is
    sum x (x^T basis), D x L with a fixed random basis, from which Nystroem's approximation is made
    (Gittens & Mahoney 2013, arXiv 1303.1849). Both are sums over tokens and add up in any order.
    They are accumulated in float32 on the inputs' device.
    """

    name: str
    sum_DL: Tensor
    count: float = 0.0  # the sum of the weights
    trace: float = 0.0
    _basis_DL: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(
        cls, name: str, width: int, columns: int, device: torch.device | str = "cpu"
    ) -> "InputMoments":
        """Return sums over no tokens, in the exact form unless `columns` is less than `width`."""
        return cls(name, torch.zeros(width, min(columns, width), device=device))

    @property
    def is_exact(self) -> bool:
        """Whether the sums have the exact form."""
        return self.sum_DL.shape[0] == self.sum_DL.shape[1]

    def add(self, input_ND: Tensor, weight_N: Tensor | None = None) -> None:
        """Add the inputs of N tokens, each of weight 1 unless `weight_N` is given."""
        input_ND = input_ND.detach().float()
        self.count += len(input_ND) if weight_N is None else float(weight_N.sum())
        if weight_N is not None:
            input_ND = input_ND * weight_N.sqrt()[:, None]
        right_NL = input_ND
        if not self.is_exact:
            right_NL = input_ND @ self.basis().to(input_ND.device)
        self.sum_DL.addmm_(input_ND.T, right_NL)
        # In float64, as the low-memory solver subtracts a nearly equal number from it.
        self.trace += float(input_ND.square().sum(dtype=torch.float64))

    def merge(self, other: "InputMoments") -> None:
        """Add another worker's sums of the same module."""
        assert self.name == other.name
        # This makes a new tensor, as the memory of an unpickled one is shared with other processes.
        self.sum_DL = self.sum_DL + other.sum_DL.to(self.sum_DL.device)
        self.count += other.count
        self.trace += other.trace

    def negate_(self) -> None:
        """Turn the sums' sign in place."""
        self.sum_DL.neg_()
        self.count, self.trace = -self.count, -self.trace

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, with the sums as a NumPy array."""
        # Ray passes NumPy arrays on without a copy (pickle protocol 5), but copies tensors. The
        # sums are large, and all processes of a node read the same ones.
        return {
            "name": self.name,
            "count": self.count,
            "trace": self.trace,
            "sum_DL": self.sum_DL.cpu().numpy(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            # Torch warns of read-only memory. Nothing here writes to it.
            warnings.simplefilter("ignore", UserWarning)
            self.__dict__.update(state, sum_DL=torch.from_numpy(state["sum_DL"]), _basis_DL=None)

    def basis(self) -> Tensor:
        """Return the random D x L basis of the low-memory form.

        It depends on the module's name alone, so that all workers' sums have the same one.
        """
        if self._basis_DL is None:
            generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            self._basis_DL = torch.randn(self.sum_DL.shape, generator=generator)
        return self._basis_DL


@dataclass
class ForgetRows:
    """The forget set's tokens at one module.

    `input_ND` has their inputs and `shift_NO` the way from each output to its target, t - h0. Both
    are multiplied with the root of the token's weight. `count` is the sum of the weights.
    """

    input_ND: Tensor
    shift_NO: Tensor
    count: float

    @classmethod
    def of(cls, input_ND: Tensor, shift_NO: Tensor, weight_N: Tensor | None = None) -> "ForgetRows":
        """Return the rows of N tokens, each of weight 1 unless `weight_N` is given. N may be 0."""
        if weight_N is None:
            weight_N = torch.ones(len(input_ND))
        root_N1 = weight_N.double().sqrt()[:, None]
        return cls(
            input_ND.detach() * root_N1, shift_NO.detach() * root_N1, float(weight_N.double().sum())
        )

    def merged(self, other: "ForgetRows") -> "ForgetRows":
        """Return these rows and other rows of the same module.

        Once there are more rows than input features, they are replaced by as many rows as features.
        """
        input_ND = torch.cat([self.input_ND, other.input_ND])
        shift_NO = torch.cat([self.shift_NO, other.shift_NO])
        # The solution depends on the rows through input^T input and shift^T input alone. A rotation
        # of the rows changes neither, and QR's makes all rows beyond D zero.
        if len(input_ND) > input_ND.shape[1]:
            rotation_ND, input_ND = torch.linalg.qr(input_ND)
            shift_NO = rotation_ND.T @ shift_NO
        return ForgetRows(input_ND, shift_NO, self.count + other.count)
