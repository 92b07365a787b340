"""What the one-pass solver needs of the data: small values that add up, so that they can be collected anywhere.

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
    """Second moments of the inputs of one module over the tokens of one set.

    Exact: `sum_DL` is sum x x^T, D x D. Low memory, for wide inputs: sum x (x^T basis), D x L with a fixed random
    basis, from which Nystroem's approximation is made (Gittens & Mahoney 2013, arXiv 1303.1849). Both are sums over
    tokens: they add up in any order. Accumulated in float32 on the inputs' device.
    """

    name: str
    sum_DL: Tensor
    count: int = 0
    trace: float = 0.0
    _basis_DL: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(
        cls, name: str, width: int, columns: int, device: torch.device | str = "cpu"
    ) -> "InputMoments":
        """Return sums over no tokens; exact unless `columns` is less than `width`."""
        return cls(name, torch.zeros(width, min(columns, width), device=device))

    @property
    def is_exact(self) -> bool:
        """Whether nothing is approximated."""
        return self.sum_DL.shape[0] == self.sum_DL.shape[1]

    def add(self, input_ND: Tensor) -> None:
        """Add tokens' inputs."""
        input_ND = input_ND.detach().float()
        right_NL = input_ND if self.is_exact else input_ND @ self.basis().to(input_ND.device)
        self.sum_DL.addmm_(input_ND.T, right_NL)
        self.count += len(input_ND)
        self.trace += float(input_ND.square().sum(dtype=torch.float64))

    def merge(self, other: "InputMoments") -> None:
        """Add another worker's sums of the same module."""
        assert self.name == other.name
        # A new tensor: the old one's memory may be shared.
        self.sum_DL = self.sum_DL + other.sum_DL.to(self.sum_DL.device)
        self.count += other.count
        self.trace += other.trace

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the sums as a NumPy array, which protocol 5 passes on without a copy: they are large, and shared."""
        return {
            "name": self.name,
            "count": self.count,
            "trace": self.trace,
            "sum_DL": self.sum_DL.cpu().numpy(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            # The memory may be shared and read-only: nothing writes to it.
            warnings.simplefilter("ignore", UserWarning)
            self.__dict__.update(state, sum_DL=torch.from_numpy(state["sum_DL"]), _basis_DL=None)

    def basis(self) -> Tensor:
        """Return the random D x L basis of the low-memory form: a function of the module's name alone."""
        if self._basis_DL is None:
            generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            self._basis_DL = torch.randn(self.sum_DL.shape, generator=generator)
        return self._basis_DL


@dataclass
class ForgetRows:
    """The forget set at one module.

    Inputs, and how far each output is from its target (t - h0), each times the root of its token's weight. `count` is
    the sum of the weights.

    The solution depends on these rows through `input^T input` and `shift^T input` alone, so once there are more rows
    than input features they are replaced by as many rows with the same two products.
    """

    input_ND: Tensor
    shift_NO: Tensor
    count: float

    @classmethod
    def of(cls, input_ND: Tensor, shift_NO: Tensor, weight_N: Tensor | None = None) -> "ForgetRows":
        """Return the rows of some tokens, or of none; without weights each weighs 1."""
        if weight_N is None:
            weight_N = torch.ones(len(input_ND))
        root_N1 = weight_N.double().sqrt()[:, None]
        return cls(
            input_ND.detach() * root_N1, shift_NO.detach() * root_N1, float(weight_N.double().sum())
        )

    def merged(self, other: "ForgetRows") -> "ForgetRows":
        """Return these rows and other rows of the same module."""
        input_ND = torch.cat([self.input_ND, other.input_ND])
        shift_NO = torch.cat([self.shift_NO, other.shift_NO])
        if len(input_ND) > input_ND.shape[1]:
            rotation_ND, input_ND = torch.linalg.qr(input_ND)
            shift_NO = rotation_ND.T @ shift_NO
        return ForgetRows(input_ND, shift_NO, self.count + other.count)
