"""What a model knows, in numbers: one metric family a file, pure functions of arrays and floats, and their table.

`table.METRICS` names every metric, with its formula and its version. A worker calls `forward.token_statistics` once per
forward pass and `sample_scores` per row; a `Sample` is the record of a row; `summarise` makes a model's entry in
scores.json of them.
"""

from pipelines.evaluation.metrics.likelihood import TokenStatistics
from pipelines.evaluation.metrics.sample import Sample
from pipelines.evaluation.metrics.summary import relearn_scores, sample_scores, summarise

__all__ = ["Sample", "TokenStatistics", "relearn_scores", "sample_scores", "summarise"]
