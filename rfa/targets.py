"""Where the forget set's features are shifted to: five targets fitted on the retain set's base features.

`retain_mean` is the target of Qin et al. 2024 (arXiv 2411.08443) as this project reconstructs it; the other four answer
its weakness on imbalanced or multi-modal data and are this project's.

Shapes: N tokens, D features, K centres.
"""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfa.settings import TargetKind

# Bounds memory: per aligned module, the retain features that k-means sees.
SAMPLE_TOKENS = 2048


@dataclass
class FeatureSums:
    """What the targets need of one module's retain features: sums, so that workers can add theirs up."""

    count: int = 0
    sum_D: Tensor | float = 0.0
    square_D: Tensor | float = 0.0
    by_label: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    sample: dict[int, Tensor] = field(default_factory=dict)  # row number -> some of its tokens

    def add(self, feature_ND: Tensor, row: int, label: int, sample_tokens: int) -> None:
        """Add one row's features; up to `sample_tokens` of them, evenly spaced, are sampled for k-means."""
        feature_ND = feature_ND.detach().to("cpu", torch.float64)
        tokens = len(feature_ND)
        sums = FeatureSums(tokens, feature_ND.sum(0), feature_ND.square().sum(0))
        if label >= 0:
            sums.by_label[label] = (tokens, feature_ND.sum(0))
        if sample_tokens:
            evenly = torch.linspace(0, tokens - 1, min(sample_tokens, tokens)).long()
            sums.sample[row] = feature_ND[evenly].float()
        self.merge(sums)

    def merge(self, other: "FeatureSums") -> None:
        """Add another worker's sums."""
        self.count += other.count
        self.sum_D = self.sum_D + other.sum_D
        self.square_D = self.square_D + other.square_D
        for label, (count, sum_D) in other.by_label.items():
            count_before, sum_before_D = self.by_label.get(label, (0, torch.zeros_like(sum_D)))
            self.by_label[label] = (count_before + count, sum_before_D + sum_D)
        self.sample |= other.sample


@dataclass
class ModuleTarget:
    """The target at one aligned module. `energy` is E|h0|^2 over retain tokens, the unit of every distance there."""

    energy: float
    centre_KD: Tensor
    label_K: Tensor | None = None
    spread_D: Tensor | None = None


def fit_target(kind: TargetKind, sums: FeatureSums, *, clusters: int, seed: int) -> ModuleTarget:
    """Fit the target of one module to its retain sums.

    Raises:
        ValueError: `class_mean` and `balanced_mean` without labels, or `class_mean` with fewer than two.
    """
    assert isinstance(sums.sum_D, Tensor)
    assert isinstance(sums.square_D, Tensor)
    mean_D = sums.sum_D / sums.count
    energy = float(sums.square_D.sum() / sums.count)
    if kind in ("class_mean", "balanced_mean") and not sums.by_label:
        raise ValueError(
            f"objective.target: {kind} needs a label column (data.columns.label); the retain rows have none"
        )
    if kind == "retain_mean":
        return ModuleTarget(energy, mean_D[None].float())
    if kind == "gaussian":
        variance_D = (sums.square_D / sums.count - mean_D.square()).clamp_min(0)
        return ModuleTarget(energy, mean_D[None].float(), spread_D=variance_D.sqrt().float())
    if kind == "cluster_mean":
        # A second to import, in every process that knows this module.
        from sklearn.cluster import KMeans

        sample_ND = torch.cat([sums.sample[row] for row in sorted(sums.sample)]).double().numpy()
        fitted = KMeans(
            min(clusters, len(sample_ND)),
            n_init=1,  # pyright: ignore[reportArgumentType]
            max_iter=25,
            random_state=seed,
        ).fit(sample_ND)
        return ModuleTarget(energy, torch.from_numpy(fitted.cluster_centers_).float())
    labels = sorted(sums.by_label)
    means_KD = torch.stack([sums.by_label[label][1] / sums.by_label[label][0] for label in labels])
    if kind == "balanced_mean":
        return ModuleTarget(energy, means_KD.mean(0, keepdim=True).float())
    if len(labels) < 2:
        raise ValueError(
            "objective.target: class_mean needs at least two labels among the retain rows; found 1"
        )
    return ModuleTarget(energy, means_KD.float(), label_K=torch.tensor(labels))


class Targets:
    """The targets of all aligned modules.

    `nearest` targets (`class_mean`, `cluster_mean`) look at the sample's base features; where the caller has only the
    features with lower residuals already in place (`local`), those are what it looks at.
    """

    def __init__(self, kind: TargetKind, modules: dict[str, ModuleTarget], seed: int) -> None:
        self.kind = kind
        self.modules = modules
        self.seed = seed
        self.looks_at_sample = kind in ("class_mean", "cluster_mean")

    def energy(self, name: str) -> float:
        """Return E|h0|^2 over the retain set's tokens at a module."""
        return self.modules[name].energy

    def __call__(self, name: str, feature_ND: Tensor, row_N: Tensor, label_N: Tensor) -> Tensor:
        """Return the targets of N tokens with features `feature_ND`, grouped by `row_N`: [N, D], without gradient."""
        target = self.modules[name]
        centre_KD = target.centre_KD.to(feature_ND.device, torch.float32)
        feature_ND = feature_ND.detach().float()
        if self.kind == "cluster_mean":
            return centre_KD[torch.cdist(feature_ND, centre_KD).argmin(1)]
        target_ND = centre_KD[0].expand(len(feature_ND), -1)
        if self.kind == "class_mean":
            assert target.label_K is not None
            target_ND = target_ND.clone()
            for row in row_N.unique().tolist():
                in_row_N = row_N == row
                distance_K = torch.cdist(feature_ND[in_row_N].mean(0, keepdim=True), centre_KD)[0]
                distance_K[target.label_K.to(label_N.device) == label_N[in_row_N][0]] = torch.inf
                target_ND[in_row_N] = centre_KD[distance_K.argmin()]
        if self.kind == "gaussian":
            assert target.spread_D is not None
            noise_ND = torch.zeros_like(feature_ND)
            for row in row_N.unique().tolist():
                noise_ND[row_N == row] = self._noise(name, row, feature_ND[row_N == row])
            target_ND = target_ND + target.spread_D.to(feature_ND.device) * noise_ND
        return target_ND

    def _noise(self, name: str, row: int, like_ND: Tensor) -> Tensor:
        """Standard normal noise that depends on seed, module and row alone: the same at every step, on any worker."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{row}".encode()))
        return torch.randn(like_ND.shape, generator=generator).to(like_ND.device)
