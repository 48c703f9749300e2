"""Labels of documents from those of their nearest neighbors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blogkeras.arguments import as_numpy, check_choice, check_integer
from blogkeras.extras import require
from blogkeras.transport.checks import check_mass
from blogkeras.transport.index import TransportIndex
from blogkeras.typing import Tensor

VOTING = ("uniform", "distance")


class TransportClassifier:
    """The k nearest neighbors by WMD or WRD vote on the class of a document.

    With d_i the distances of the k nearest training documents, whose class is
    c_i, the share of class c is

        voting="uniform":   the number of c_i = c, divided by k
        voting="distance":  Σ_{c_i = c} 1/d_i, divided by Σ 1/d_i

    Where neighbors have distance 0 (the same words in any order, for example)
    only these vote, equally. The class with the
    largest share is predicted, of equal ones the first. It has the methods of
    an estimator of scikit-learn, `get_params` and `set_params` included, so
    that its model selection takes it.

    Args:
        k: Integer ≥ 1. Number of neighbors; with fewer training documents all
            of them vote.
        vectors: `(num_words, dim)`, the vectors of all words, for documents of
            word ids, or `None`.
        cost: `"cosine"`, `"euclidean"` or `"rms"`.
        weights: `"norm"`, `"uniform"`, or, for word ids only, `"idf"`.
        voting: `"uniform"` or `"distance"`.
        verbose: `"auto"`, 0 or 1: whether progress bars are shown.

    Attributes:
        classes_: `(num_classes,)`, the labels in order, after `fit`.
        index: The `TransportIndex` of the training documents, after `fit`.

    Raises:
        ValueError: in `fit` and later, on arguments out of range, documents
            that `TransportIndex` refuses, and another number of labels than of
            documents.

    Example:

    >>> vectors = np.random.default_rng(0).normal(size=(100, 8))
    >>> classifier = TransportClassifier(k=1, vectors=vectors)
    >>> classifier = classifier.fit([[1, 2], [3, 4, 4]], ["first", "second"])
    >>> classifier.predict([[4, 3]]).tolist()
    ['second']

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf);
        [blog post](https://kexue.fm/archives/7388)
    """

    _estimator_type = "classifier"  # how scikit-learn before 1.6 tells

    def __init__(
        self,
        k: int = 5,
        vectors: Tensor | None = None,
        cost: str = "cosine",
        weights: str = "norm",
        voting: str = "uniform",
        verbose: str | int = 0,
    ) -> None:
        # Estimators of scikit-learn keep their arguments as they are given,
        # and check them in `fit`.
        self.k = k
        self.vectors = vectors
        self.cost = cost
        self.weights = weights
        self.voting = voting
        self.verbose = verbose

    def fit(
        self, documents: Sequence[Any], labels: Any
    ) -> "TransportClassifier":
        """Keeps documents and labels.

        Args:
            documents: Sequence of documents, see `TransportIndex`.
            labels: `(len(documents),)`, integers or strings.

        Returns:
            The classifier itself.
        """
        check_integer("k", self.k, minimum=1)
        check_choice("voting", self.voting, VOTING)
        labels = as_numpy(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "biuUSO":
            raise ValueError(
                "Expected `labels` to be integers or strings along one axis. "
                f"Received: shape {labels.shape}, dtype {labels.dtype}"
            )
        try:
            classes, numbers = np.unique(labels, return_inverse=True)
        except TypeError as error:
            raise ValueError(
                "Expected `labels` of one type, none of them missing. "
                f"Received: {error}"
            ) from error
        self.index = TransportIndex(
            documents, self.vectors, self.cost, self.weights, self.verbose
        )
        if len(labels) != len(self.index):
            raise ValueError(
                "Expected one label for each document. Received: "
                f"{len(labels)} labels for {len(self.index)} documents"
            )
        self.classes_, self._classes = classes, numbers
        return self

    def predict_proba(self, documents: Sequence[Any]) -> np.ndarray:
        """The share of each class in the votes.

        Args:
            documents: As in `fit`.

        Returns:
            `(len(documents), num_classes)`, float64, in the order of
            `classes_`.
        """
        if not hasattr(self, "index"):
            raise ValueError(
                "Expected a classifier that has documents: call `fit` first. "
                "Received: `predict` before `fit`"
            )
        k = check_integer("k", self.k, minimum=1)
        voting = check_choice("voting", self.voting, VOTING)
        distances, indices = self.index.kneighbors(
            documents, min(k, len(self.index)), self.verbose
        )
        votes = np.ones_like(distances)
        if voting == "distance":
            # The nearest one has the vote 1, so that nothing overflows.
            nearest = distances[:, :1]
            equal = distances == 0
            ratio = nearest / np.where(equal, 1, distances)
            votes = np.where(equal.any(1, keepdims=True), equal, ratio)
        shares = np.zeros((len(votes), len(self.classes_)))
        rows = np.arange(len(votes))[:, None]
        np.add.at(shares, (rows, self._classes[indices]), votes)
        return shares / shares.sum(1, keepdims=True)

    def predict(self, documents: Sequence[Any]) -> np.ndarray:
        """The class with the most votes of each document.

        Args:
            documents: As in `fit`.

        Returns:
            `(len(documents),)`, labels as in `fit`.
        """
        shares = self.predict_proba(documents)
        return self.classes_[shares.argmax(1)]

    def score(
        self, documents: Sequence[Any], labels: Any, sample_weight: Any = None
    ) -> float:
        """The share of documents whose class is predicted.

        Args:
            documents: As in `fit`.
            labels: As in `fit`.
            sample_weight: `(len(documents),)`, how much each counts, or `None`.

        Returns:
            Float.
        """
        found, labels = self.predict(documents), as_numpy(labels)
        if labels.shape != found.shape:
            raise ValueError(
                "Expected one label for each document. Received: labels of "
                f"shape {labels.shape} for {len(found)} documents"
            )
        if sample_weight is None:
            return float((found == labels).mean())
        sample_weight = as_numpy(sample_weight)
        check_mass("sample_weight", sample_weight, normalized=False)
        if sample_weight.shape != found.shape or not sample_weight.any():
            raise ValueError(
                "Expected one number for each document as `sample_weight`, not "
                f"all of them 0. Received: shape {sample_weight.shape}"
            )
        return float(np.average(found == labels, weights=sample_weight))

    def __sklearn_tags__(self) -> Any:
        """What the estimator is and takes, for scikit-learn from 1.6 on."""
        utils = require("sklearn.utils")
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=True),
            classifier_tags=utils.ClassifierTags(),
            input_tags=utils.InputTags(two_d_array=False),
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor.

        Args:
            deep: Without effect; scikit-learn gives it.

        Returns:
            Dict.
        """
        names = ("k", "vectors", "cost", "weights", "voting", "verbose")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> "TransportClassifier":
        """Sets arguments of the constructor.

        The next `fit` takes all of them, the next prediction `k`, `voting` and
        `verbose`.

        Args:
            **params: Their names and values.

        Returns:
            The classifier itself.
        """
        unknown = set(params) - set(self.get_params())
        if unknown:
            raise ValueError(
                f"Expected names of {sorted(self.get_params())}. Received: "
                f"{sorted(unknown)}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self
