"""The metrics of the GLUE tasks, as a module for `evaluate.load` that needs no network.

The configurations are the nine tasks, and `classification` and `regression` for data of one's own.
"""

from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

ACCURACY = ("mnli", "qnli", "rte", "sst2", "wnli", "classification")
ACCURACY_AND_F1 = ("mrpc", "qqp")
REGRESSION = ("stsb", "regression")


class GlueMetric(evaluate.Metric):
    """Accuracy, F1, Matthews correlation, or the correlations of a regression, as the task has it."""

    def _info(self) -> evaluate.MetricInfo:
        known = (*ACCURACY, *ACCURACY_AND_F1, *REGRESSION, "cola")
        if self.config_name not in known:
            raise ValueError(f"the configuration must be one of {', '.join(sorted(known))}, got {self.config_name!r}.")
        number = datasets.Value("float64" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        if self.config_name == "stsb":
            return {
                "pearson": float(pearsonr(predictions, references)[0]),
                "spearmanr": float(spearmanr(predictions, references)[0]),
            }
        if self.config_name == "regression":
            return {
                "mse": float(mean_squared_error(references, predictions)),
                "pearson": float(pearsonr(predictions, references)[0]),
            }
        metrics = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in ACCURACY_AND_F1:
            metrics["f1"] = float(f1_score(references, predictions))
        return metrics
