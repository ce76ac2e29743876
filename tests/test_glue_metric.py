import math

import evaluate
import numpy as np
import pytest
import run_glue
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    for task in (*run_glue.TASKS, "classification", "regression"):
        metric = evaluate.load(run_glue.METRIC, task)
        if task in ("stsb", "regression"):
            predictions, references = rng.normal(size=(2, 50))
            expected = {"pearson": pearsonr(predictions, references)[0]}
            if task == "stsb":
                expected["spearmanr"] = spearmanr(predictions, references)[0]
            else:
                expected["mse"] = mean_squared_error(references, predictions)
        else:
            predictions, references = rng.integers(3 if task == "mnli" else 2, size=(2, 50))
            expected = {"accuracy": accuracy_score(references, predictions)}
            if task == "cola":
                expected = {"matthews_correlation": matthews_corrcoef(references, predictions)}
            if task in ("mrpc", "qqp"):
                expected["f1"] = f1_score(references, predictions)
        metrics = metric.compute(predictions=predictions, references=references)
        assert metrics == pytest.approx(expected, rel=1e-12), task
        assert all(math.isfinite(value) for value in metrics.values())


def test_a_metric_of_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="got 'sst3'"):
        evaluate.load(run_glue.METRIC, "sst3")
