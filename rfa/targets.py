"""The targets that the forget set's features are shifted to.

There are seven kinds. `retain_mean` is the target of Qin et al. 2024 (arXiv 2411.08443) as this
project reconstructs it. Four others answer its weakness on imbalanced or multi-modal data and are
this project's. `steering` is that of RMU (Li et al. 2024, arXiv 2403.03218). `reroute` has no
place of its own: features are to be unlike what they were (Zou et al. 2024, arXiv 2406.04313), so
the base model's own features stand for it.

Shapes: N tokens, D features, K centres.
"""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfa.settings import Objective, TargetKind

# The retain features that k-means sees per aligned module. It bounds memory.
SAMPLE_TOKENS = 2048


@dataclass
class FeatureSums:
    """Sums over one module's retain features, from which every target is fitted.

    Workers' sums add up. `by_label` has the count and the sum of each label's features. `sample`
    has some tokens' features of a row, by the numbers of the row and of its part, so that their
    order is the same however rows are split.
    """

    count: int = 0
    sum_D: Tensor | float = 0.0
    square_D: Tensor | float = 0.0
    by_label: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    sample: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def add(
        self, feature_ND: Tensor, row: int, label: int, sample_tokens: int, *, part: int = 0
    ) -> None:
        """Add the features of one row, or of a part of it, and sample up to `sample_tokens` of them, evenly spaced."""
        # In float64, as the difference of large sums gives the variance.
        feature_ND = feature_ND.detach().to("cpu", torch.float64)
        tokens = len(feature_ND)
        sums = FeatureSums(tokens, feature_ND.sum(0), feature_ND.square().sum(0))
        if label >= 0:
            sums.by_label[label] = (tokens, feature_ND.sum(0))
        if sample_tokens:
            evenly = torch.linspace(0, tokens - 1, min(sample_tokens, tokens)).long()
            sums.sample[row, part] = feature_ND[evenly].float()
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
    """The target at one aligned module.

    `energy` is E|h0|^2 over retain tokens, the unit of every distance at the module. `label_K` are
    the centres' labels (`class_mean`), `spread_D` the standard deviations (`gaussian`).
    """

    energy: float
    centre_KD: Tensor
    label_K: Tensor | None = None
    spread_D: Tensor | None = None


def fit_target(objective: Objective, sums: FeatureSums, *, seed: int) -> ModuleTarget:
    """Fit the target of one module to its retain sums.

    Raises:
        ValueError: `class_mean` and `balanced_mean` without labels, or `class_mean` with fewer than
            two.
    """
    assert isinstance(sums.sum_D, Tensor)
    assert isinstance(sums.square_D, Tensor)
    kind = objective.target
    mean_D = sums.sum_D / sums.count
    energy = float(sums.square_D.sum() / sums.count)
    if kind in ("class_mean", "balanced_mean") and not sums.by_label:
        raise ValueError(
            f"objective.target: {kind} needs a label column (data.columns.label); "
            "the retain rows have none"
        )
    if kind in ("retain_mean", "reroute"):
        return ModuleTarget(energy, mean_D[None].float())
    if kind == "steering":
        # No component is negative, as in the authors' code.
        vector_D = torch.rand(len(mean_D), generator=torch.Generator().manual_seed(seed))
        vector_D *= objective.steering / vector_D.norm()
        return ModuleTarget(energy, vector_D[None])
    if kind == "gaussian":
        # Rounding can leave a difference of equal numbers below 0, and its root would be NaN.
        variance_D = (sums.square_D / sums.count - mean_D.square()).clamp_min(0)
        return ModuleTarget(energy, mean_D[None].float(), spread_D=variance_D.sqrt().float())
    if kind == "cluster_mean":
        # Imported here, as it takes a second, which every process that imports this module would
        # pay.
        from sklearn.cluster import KMeans

        # By number, as k-means depends on the order of its points.
        sample_ND = torch.cat([sums.sample[key] for key in sorted(sums.sample)]).double().numpy()
        fitted = KMeans(
            min(objective.clusters, len(sample_ND)),
            n_init=1,  # pyright: ignore[reportArgumentType]
            max_iter=25,
            random_state=seed,
        ).fit(sample_ND)
        return ModuleTarget(energy, torch.from_numpy(fitted.cluster_centers_).float())
    labels = sorted(sums.by_label)
    means: list[Tensor] = []
    for label in labels:
        count, sum_D = sums.by_label[label]
        means.append(sum_D / count)
    means_KD = torch.stack(means)
    if kind == "balanced_mean":
        return ModuleTarget(energy, means_KD.mean(0, keepdim=True).float())
    if len(labels) < 2:
        raise ValueError(
            "objective.target: class_mean needs at least two labels among the retain rows; found 1"
        )
    return ModuleTarget(energy, means_KD.float(), label_K=torch.tensor(labels))


class Targets:
    """The targets of all aligned modules.

    Nearest targets (`class_mean`, `cluster_mean`) and `reroute` depend on the sample's base
    features. With `local` residuals the caller has them only with the lower residuals in place, and passes those.
    """

    def __init__(self, kind: TargetKind, modules: dict[str, ModuleTarget], seed: int) -> None:
        self.kind = kind
        self.modules = modules
        self.seed = seed
        self.looks_at_sample = kind in ("class_mean", "cluster_mean", "reroute")

    def energy(self, name: str) -> float:
        """Return E|h0|^2 over the retain set's tokens at a module."""
        return self.modules[name].energy

    def __call__(self, name: str, feature_ND: Tensor, row_N: Tensor, label_N: Tensor) -> Tensor:
        """Return the targets of N tokens, [N, D], without gradient; for `reroute` their features.

        `row_N` is the number of each token's row and `label_N` that row's label.
        """
        target = self.modules[name]
        centre_KD = target.centre_KD.to(feature_ND.device, torch.float32)
        feature_ND = feature_ND.detach().float()
        if self.kind == "reroute":
            return feature_ND
        if self.kind == "cluster_mean":
            return centre_KD[torch.cdist(feature_ND, centre_KD).argmin(1)]
        target_ND = centre_KD[0].expand(len(feature_ND), -1)
        if self.kind == "class_mean":
            assert target.label_K is not None
            target_ND = target_ND.clone()
            # A row has one target, the centre nearest to its mean, other than its own class's.
            for row in row_N.unique().tolist():
                in_row_N = row_N == row
                distance_K = torch.cdist(feature_ND[in_row_N].mean(0, keepdim=True), centre_KD)[0]
                distance_K[target.label_K.to(label_N.device) == label_N[in_row_N][0]] = torch.inf
                target_ND[in_row_N] = centre_KD[distance_K.argmin()]
        if self.kind == "gaussian":
            assert target.spread_D is not None
            noise_ND = torch.zeros_like(feature_ND)
            # The noise depends on seed, module and row alone, so that the target stays where it is
            # at every step and on any worker.
            for row in row_N.unique().tolist():
                in_row_N = row_N == row
                generator = torch.Generator()
                generator.manual_seed(zlib.crc32(f"{self.seed}/{name}/{row}".encode()))
                row_ND = torch.randn(feature_ND[in_row_N].shape, generator=generator)
                noise_ND[in_row_N] = row_ND.to(feature_ND.device)
            target_ND = target_ND + target.spread_D.to(feature_ND.device) * noise_ND
        return target_ND
