"""The table of metrics. Its readers: scores.json (its `versions`), the terminal, the page,
docs/scores.md, the verdict and the search's score.
"""

from pipelines.evaluation.metrics.model_metrics import OF_MODELS
from pipelines.evaluation.metrics.set_metrics import OF_SETS

METRICS = (*OF_SETS, *OF_MODELS)
BY_NAME = {metric.name: metric for metric in METRICS}
JUDGED = [metric for metric in METRICS if metric.judged]  # what the verdict counts
