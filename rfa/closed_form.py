"""The one-pass solver: the adapter of one module in closed form. This project's own.

With `local` residuals the objective is, module by module, a weighted low-rank least-squares
problem:

    minimise over rank(M) <= rank:   strength * mean over D_f of |h0 + M x - t|^2
                                     + mean over D_r of |M x|^2
                                     + w_u * mean over D_u of |M x|^2
                                     + mean over D_e of |M x|^2 + ridge

of forget, retain and utility rows, and of those that earlier requests have forgotten.

The forget set's mean is a weighted one: tokens that carry a row's fact may weigh more.
The kept sets enter through R = G_r/n_r + w_u G_u/n_u + G_e/n_e + ridge * mean(diag) * I alone. It
does not depend on the strength, and is factored once. The forget set enters through its (few)
tokens' inputs X and shifts T = t - h0. With K = X R^-1 X^T, lambda = n_f / strength and
Z = (K + lambda)^-1 T the full-rank solution is

    M = Z^T X R^-1

which is `C S^-1` of the usual normal equations. Reduced-rank regression (Izenman 1975) keeps the
leading eigenvectors U of M S M^T = Z^T K T:  B = U,  A = U^T M / scaling. One Cholesky factor of the
tokens' kernel and the leading part of one eigenproblem are all the work. With fewer tokens than
outputs the eigenproblem is posed in the span of T.

Shapes: N tokens, D input features, O output features, P = min(N, O), K rank, L columns.
"""

import math
from typing import NamedTuple

import torch
from scipy.linalg import eigh
from torch import Tensor

from rfa.moments import ForgetRows, InputMoments


class LowRankUpdate(NamedTuple):
    """B A times the adapter's scaling is the solution.

    There are fewer than `rank` rows where fewer carry anything.
    """

    a_KD: Tensor
    b_OK: Tensor


class InverseMoments:
    """R^-1 of the retained sets' second moments, applied to inputs; float64 on the CPU.

    With low-memory sums R is Nystroem's approximation plus what it leaves out of the trace, spread
    evenly: directions that the basis has missed count as used by the retained sets, not as free.
    """

    def __init__(self, weighted: list[tuple[float, InputMoments]], ridge: float) -> None:
        """Args:
            weighted: sums of each retained set with its weight.
            ridge: added to the diagonal, in units of its mean.

        Raises:
            ValueError: the sums hold no tokens.
        """
        present = [(weight, sums) for weight, sums in weighted if weight > 0 and sums.count > 0]
        if not present:
            raise ValueError("solve: the retain and utility sets have no tokens")
        mean_DL = torch.zeros(present[0][1].sum_DL.shape, dtype=torch.float64)
        for weight, sums in present:
            mean_DL.add_(sums.sum_DL.cpu(), alpha=weight / sums.count)
        trace = sum(sums.trace * weight / sums.count for weight, sums in present)
        width = len(mean_DL)
        # Inputs that are all zero would leave no ridge, and R singular.
        level = max(trace / width, torch.finfo(torch.float64).tiny)
        self._factor_DL: Tensor | None = None
        if present[0][1].is_exact:
            self._cholesky_DD = _cholesky(mean_DL, ridge * level)
            return
        basis_DL = present[0][1].basis().double()
        core_LL = basis_DL.T @ mean_DL
        # The sums are float32, so the core is symmetric only up to their rounding.
        core_LL = (core_LL + core_LL.T) / 2
        # Fewer tokens than columns leave it singular. The shift is for that, and no ridge.
        core_cholesky_LL = _cholesky(core_LL, 1e-9 * float(core_LL.diagonal().mean()))
        factor_DL = torch.linalg.solve_triangular(core_cholesky_LL, mean_DL.T, upper=False).T
        # Nystroem's part has at most the whole trace, but for rounding.
        left_out = max(trace - float(factor_DL.square().sum()), 0.0) / width
        self._diagonal = ridge * level + left_out
        self._factor_DL = factor_DL
        gram_LL = factor_DL.T @ factor_DL
        self._inner_LL = _cholesky(gram_LL, self._diagonal)

    def kernel(self, input_ND: Tensor) -> Tensor:
        """Return X R^-1 X^T; half the work of X R^-1, where the factor is exact."""
        input_ND = input_ND.double().cpu()
        if self._factor_DL is not None:
            kernel_NN = self(input_ND) @ input_ND.T
            # Woodbury's is symmetric up to rounding, and a Cholesky factor reads one triangle.
            return (kernel_NN + kernel_NN.T) / 2
        half_DN = torch.linalg.solve_triangular(self._cholesky_DD, input_ND.T, upper=False)
        return half_DN.T @ half_DN

    def energy(self, a_KD: Tensor) -> Tensor:
        """Return A R A^T: what the kept sets' tokens get of a map's rows, K x K."""
        a_KD = a_KD.double().cpu()
        if self._factor_DL is None:
            half_KD = a_KD @ self._cholesky_DD
            return half_KD @ half_KD.T
        half_KL = a_KD @ self._factor_DL
        return half_KL @ half_KL.T + self._diagonal * (a_KD @ a_KD.T)

    def __call__(self, input_ND: Tensor) -> Tensor:
        """Return X R^-1."""
        input_ND = input_ND.double().cpu()
        if self._factor_DL is None:
            return torch.cholesky_solve(input_ND.T, self._cholesky_DD).T
        # Woodbury's identity: (F F^T + d I)^-1 takes a system of L columns in place of one of D.
        inner_LN = torch.cholesky_solve(self._factor_DL.T @ input_ND.T, self._inner_LL)
        return (input_ND - (self._factor_DL @ inner_LN).T) / self._diagonal


def _cholesky(matrix_DD: Tensor, diagonal: float) -> Tensor:
    """Return the Cholesky factor of `matrix + diagonal * I`.

    The diagonal grows tenfold until the factorisation succeeds, because rounding may have made the
    matrix indefinite.
    """
    # A diagonal of 0 would stay 0 however often it is multiplied.
    least = 1e-12 * max(float(matrix_DD.diagonal().mean()), 1e-300)
    # A matrix that is not finite never factors, and the diagonal overflows.
    while math.isfinite(diagonal):
        shifted_DD = matrix_DD.clone()
        shifted_DD.diagonal().add_(diagonal)
        factor_DD, failed = torch.linalg.cholesky_ex(shifted_DD)
        if not failed:
            return factor_DD
        diagonal = max(10 * diagonal, least)
    raise ValueError("solve: the features are not finite")


def solve(
    forget: ForgetRows, kept: InverseMoments, *, rank: int, strength: float, scaling: float = 1.0
) -> LowRankUpdate:
    """Return the best adapter of rank `rank` or less; float64 on the CPU.

    Args:
        forget: the forget set's tokens at the module.
        kept: the inverse moments of the retained sets.
        strength: weight of the forget set's mean against the retain set's.
        scaling: alpha / rank of the adapter.

    Raises:
        ValueError: the tokens' features are not finite.
    """
    input_ND, shift_NO = forget.input_ND.cpu(), forget.shift_NO.cpu()
    if not (input_ND.isfinite().all() and shift_NO.isfinite().all()):
        raise ValueError("solve: the features are not finite")
    kernel_NN = kept.kernel(input_ND)
    # With fewer tokens than outputs the eigenproblem is posed in the span of T: N x N, not O x O.
    few_tokens = len(shift_NO) < shift_NO.shape[1]
    basis_OP = torch.linalg.qr(shift_NO.T)[0] if few_tokens else None
    shift_NP = shift_NO if basis_OP is None else shift_NO @ basis_OP
    weighted_NP = torch.cholesky_solve(shift_NP, _cholesky(kernel_NN, forget.count / strength))
    energy_PP = weighted_NP.T @ (kernel_NN @ shift_NP)
    left_PK = _leading((energy_PP + energy_PP.T) / 2, rank)
    # The layer multiplies B A with the scaling, so A is without it.
    a_KD = kept((left_PK.T @ weighted_NP.T) @ input_ND) / scaling
    return LowRankUpdate(a_KD, left_PK if basis_OP is None else basis_OP @ left_PK)


def added(
    first: LowRankUpdate,
    second: LowRankUpdate,
    forget: ForgetRows,
    kept: InverseMoments,
    *,
    rank: int,
    strength: float = 1.0,
) -> LowRankUpdate:
    """Return the sum of two updates of one module, at rank `rank` or less.

    What is dropped is what the kept and the forget tokens together notice least: the sum M is
    approximated in the metric of R + strength * mean of x x^T over the forget tokens.
    """
    a_QD = torch.cat([first.a_KD, second.a_KD]).double()
    b_OQ = torch.cat([first.b_OK, second.b_OK], dim=1).double()
    shared_NQ = forget.input_ND.double().cpu() @ a_QD.T
    energy_QQ = kept.energy(a_QD) + strength / forget.count * (shared_NQ.T @ shared_NQ)
    values, vectors = torch.linalg.eigh((energy_QQ + energy_QQ.T) / 2)
    # tr(b E b^T) is |b root(E)|^2, whose best approximation of a rank is the SVD's (Eckart and
    # Young 1936). Rounding can make an eigenvalue of E negative, which has no root.
    root_QQ = vectors * values.clamp(min=0).sqrt()
    left_OQ, _, _ = torch.linalg.svd(b_OQ @ root_QQ, full_matrices=False)
    left_OK = left_OQ[:, : min(rank, left_OQ.shape[1])]
    return LowRankUpdate((left_OK.T @ b_OQ) @ a_QD, left_OK)


def _leading(matrix_PP: Tensor, number: int) -> Tensor:
    """Return up to `number` leading eigenvectors, by falling eigenvalue.

    Those whose eigenvalue is rounding alone are left out.
    """
    size = len(matrix_PP)
    if not size:
        return matrix_PP
    leading = max(0, size - number), size - 1
    # SciPy's computes a part of the eigenvectors. Torch's `eigh` always computes all of them.
    values, vectors = eigh(
        matrix_PP.numpy(), subset_by_index=leading, driver="evr", check_finite=False
    )
    least = max(1e-13 * float(values[-1]), 1e-300)
    return torch.from_numpy(vectors[:, ::-1][:, values[::-1] > least].copy())
