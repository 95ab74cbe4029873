"""The scikit-learn classifiers that can teach by name, and what each wants. Imports none of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimator:
    """Where an estimator lives and what it wants. trees: split on values, so neither scale nor one-hot codes matter."""

    module: str
    trees: bool = False
    takes_missing: bool = False
    takes_sparse: bool = True
    takes_negative: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


ESTIMATORS = {
    "LogisticRegression": Estimator("linear_model", defaults={"max_iter": 1000}),
    "SGDClassifier": Estimator("linear_model"),
    "RidgeClassifier": Estimator("linear_model"),
    "LinearSVC": Estimator("svm"),
    "SVC": Estimator("svm"),
    "KNeighborsClassifier": Estimator("neighbors"),
    "MLPClassifier": Estimator("neural_network"),
    "GaussianNB": Estimator("naive_bayes", takes_sparse=False),
    "BernoulliNB": Estimator("naive_bayes"),
    "MultinomialNB": Estimator("naive_bayes", takes_negative=False),
    "ComplementNB": Estimator("naive_bayes", takes_negative=False),
    "LinearDiscriminantAnalysis": Estimator("discriminant_analysis", takes_sparse=False),
    "QuadraticDiscriminantAnalysis": Estimator("discriminant_analysis", takes_sparse=False),
    "DecisionTreeClassifier": Estimator("tree", trees=True),
    "RandomForestClassifier": Estimator("ensemble", trees=True),
    "ExtraTreesClassifier": Estimator("ensemble", trees=True),
    "GradientBoostingClassifier": Estimator("ensemble", trees=True),
    "AdaBoostClassifier": Estimator("ensemble", trees=True),
    "HistGradientBoostingClassifier": Estimator("ensemble", trees=True, takes_missing=True, takes_sparse=False),
}
