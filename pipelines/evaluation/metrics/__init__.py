"""What a model knows, in numbers: pure functions of arrays and floats, one metric family a file.

`table.METRICS` lists every metric. A worker calls `forward.token_statistics` once per forward pass
and `sample_scores` per row; `summarise` makes a model's entry in scores.json of the `Sample`s.
"""

from pipelines.evaluation.metrics.likelihood import TokenStatistics
from pipelines.evaluation.metrics.sample import Sample
from pipelines.evaluation.metrics.summary import relearn_scores, sample_scores, summarise

__all__ = ["Sample", "TokenStatistics", "relearn_scores", "sample_scores", "summarise"]
