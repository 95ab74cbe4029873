"""The scikit-learn classifiers that can teach by name, and what each wants. Imports none of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KnownEstimator:
    """Where an estimator lives and what it wants. trees: split on values, so neither scale nor one-hot codes matter."""

    module: str
    trees: bool = False
    takes_missing: bool = False
    takes_sparse: bool = True
    takes_negative: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


ESTIMATORS = {
    "LogisticRegression": KnownEstimator("linear_model", defaults={"max_iter": 1000}),
    "SGDClassifier": KnownEstimator("linear_model"),
    "RidgeClassifier": KnownEstimator("linear_model"),
    "LinearSVC": KnownEstimator("svm"),
    "SVC": KnownEstimator("svm"),
    "KNeighborsClassifier": KnownEstimator("neighbors"),
    "MLPClassifier": KnownEstimator("neural_network"),
    "GaussianNB": KnownEstimator("naive_bayes", takes_sparse=False),
    "BernoulliNB": KnownEstimator("naive_bayes"),
    "MultinomialNB": KnownEstimator("naive_bayes", takes_negative=False),
    "ComplementNB": KnownEstimator("naive_bayes", takes_negative=False),
    "LinearDiscriminantAnalysis": KnownEstimator("discriminant_analysis", takes_sparse=False),
    "QuadraticDiscriminantAnalysis": KnownEstimator("discriminant_analysis", takes_sparse=False),
    "DecisionTreeClassifier": KnownEstimator("tree", trees=True),
    "RandomForestClassifier": KnownEstimator("ensemble", trees=True),
    "ExtraTreesClassifier": KnownEstimator("ensemble", trees=True),
    "GradientBoostingClassifier": KnownEstimator("ensemble", trees=True),
    "AdaBoostClassifier": KnownEstimator("ensemble", trees=True),
    "HistGradientBoostingClassifier": KnownEstimator("ensemble", trees=True, takes_missing=True, takes_sparse=False),
}
