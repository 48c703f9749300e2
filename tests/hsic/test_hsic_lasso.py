"""HSIC Lasso as a selector of scikit-learn."""

import copy
import functools
import pickle
import sys

import numpy as np
import pytest
import scipy.sparse
import sklearn.feature_selection
import sklearn.linear_model
import sklearn.model_selection
import sklearn.pipeline
from hsic_reference import LINEAR, gaussian
from kit import slow_on_jax
from sklearn.base import clone

from blogkeras.hsic import (
    DeltaKernel,
    GaussianKernel,
    HSICLasso,
    PrecomputedKernel,
    lasso,
)

RNG = np.random.default_rng(5)
X = RNG.normal(size=(60, 7))
X[:, 6] = X[:, 1] + 0.3 * RNG.normal(size=60)
Y = np.sin(2 * X[:, 1]) + X[:, 4] ** 2 + 0.3 * RNG.normal(size=60)
LABELS = (X[:, 0] > 0).astype(int) + (np.abs(X[:, 3]) > 1)
# pyHSICLasso 1.4.2 on these: HSICLasso().regression(3, B=0) and
# .classification(3, B=0). Its nlars stops one step before the 4th feature.
THEIRS = {
    "regression": {
        "relevance": "0.017235 0.247457 0.054991 0.03374 0.241114 0.052808 "
        "0.203758",
        "coefficients": "0 0.188008 0.002262 0 0.180891 0 0",
    },
    "classification": {
        "relevance": "0.316433 0.016846 0.055553 0.175816 0.028927 0.034702 "
        "0.017581",
        "coefficients": "0.287818 0 0.019523 0.141507 0 0 0",
    },
}
REDUNDANCY_OF_1 = [0.00817, 1, 0.020596, 0.020885, 0.10159, 0.021749, 0.884939]


def centered(k):
    j = np.eye(len(k)) - 1 / len(k)
    return j @ k @ j


def matrices(x):
    return [centered(gaussian(c / c.std(), 1.0)) for c in x.T]


def of_labels(labels):
    return centered(
        (labels[:, None] == labels) / np.bincount(labels)[labels][:, None]
    )


def alignments(features, target):
    flat = np.array([k.ravel() for k in [*features, target]])
    products = flat @ flat.T
    norm = np.sqrt(np.diag(products))
    products /= norm[:, None] * norm
    return products[:-1, -1], products[:-1, :-1]


def assert_solves(selector, wanted):
    """The conditions of Karush, Kuhn and Tucker, where the next one enters."""
    alpha, relevance = selector.coef_, selector.relevance_
    assert (alpha > 0).sum() == wanted
    residual = relevance - selector.redundancy_ @ alpha
    active = alpha > 0
    np.testing.assert_allclose(residual[active], residual[active][0], rtol=1e-5)
    assert np.all(residual[~active] <= residual[active][0] * (1 + 1e-5))
    assert residual[~active].max() == pytest.approx(residual[active][0], 1e-5)


@pytest.mark.parametrize("target", THEIRS)
def test_formula_and_peer(target):
    y = Y if target == "regression" else LABELS
    selector = HSICLasso(3, target=target).fit(X, y)
    kernel = gaussian(Y / Y.std(), 1.0) if target == "regression" else None
    kernel = of_labels(LABELS) if kernel is None else centered(kernel)
    relevance, redundancy = alignments(matrices(X), kernel)
    # Sums of 3600 products in float32: their order is the processor's own.
    close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=2e-6)
    close(selector.relevance_, relevance)
    close(selector.redundancy_, redundancy)
    assert_solves(selector, 3)
    theirs = {k: np.array(v.split(), float) for k, v in THEIRS[target].items()}
    close(selector.relevance_, theirs["relevance"])
    close(selector.redundancy_[1], REDUNDANCY_OF_1)
    close(selector.coef_, theirs["coefficients"], atol=2e-5)


def test_ranking():
    """Feature 6 is 1 with noise: only one of them is taken."""
    selector = HSICLasso(2).fit(X, Y)
    assert selector.get_support(indices=True).tolist() == [1, 4]
    assert selector.ranking_.tolist() == [3, 1, 3, 3, 2, 3, 3]
    np.testing.assert_array_equal(selector.transform(X), X[:, [1, 4]])
    assert HSICLasso().fit(X, Y).get_support().sum() == 3
    assert HSICLasso(0.3).fit(X, Y).get_support().sum() == 2
    # Of two copies one is taken, even where places are left.
    copies = np.concatenate([X, X[:, ::-1]], axis=1)
    for wanted in (2, 14):
        support = HSICLasso(wanted).fit(copies, Y).get_support()
        first, second = support[:7], support[:6:-1]
        assert (first | second)[[1, 4]].all()
        assert not (first & second).any()


def test_tiles(monkeypatch):
    """Tiles of 16 rows, the last one short."""
    whole = HSICLasso(3).fit(X, Y)
    monkeypatch.setattr(lasso, "TILE", 8 * 60 * 16)
    tiles = HSICLasso(3).fit(X, Y)
    np.testing.assert_allclose(tiles.redundancy_, whole.redundancy_, atol=1e-6)
    np.testing.assert_allclose(tiles.relevance_, whole.relevance_, atol=1e-6)


def test_blocks():
    selector = HSICLasso(2, block_size=25, num_shuffles=2, seed=7).fit(X, Y)
    rng, y = np.random.default_rng(7), Y / Y.std()
    total = 0.0
    for _ in range(2):
        order = rng.permutation(60)
        for block in (order[:25], order[25:50]):
            columns = [*(X / X.std(axis=0)).T, y]
            flat = np.array(
                [centered(gaussian(c[block], 1.0)).ravel() for c in columns]
            )
            total = total + flat @ flat.T
    norm = np.sqrt(np.diag(total))
    total /= norm[:, None] * norm
    np.testing.assert_allclose(selector.relevance_, total[:-1, -1], atol=2e-6)
    np.testing.assert_allclose(selector.redundancy_, total[:-1, :-1], atol=2e-6)
    again = HSICLasso(2, block_size=25, num_shuffles=2, seed=7).fit(X, Y)
    np.testing.assert_array_equal(again.coef_, selector.coef_)
    other = HSICLasso(2, block_size=25, num_shuffles=2, seed=8).fit(X, Y)
    assert not np.array_equal(other.coef_, selector.coef_)
    whole = HSICLasso(2, block_size=60).fit(X, Y)
    np.testing.assert_array_equal(whole.coef_, HSICLasso(2).fit(X, Y).coef_)


def test_targets():
    names = np.array(["ant", "bee", "cat"])[LABELS]
    labels = HSICLasso(2, target="classification").fit(X, LABELS)
    for y in (names, list(names), names.astype(object)):
        found = HSICLasso(2).fit(X, y)
        np.testing.assert_array_equal(found.coef_, labels.coef_)
    with pytest.raises(ValueError, match="integers may be classes or numbers"):
        HSICLasso(2).fit(X, LABELS)
    numbers = HSICLasso(2, target="regression").fit(X, LABELS)
    floats = HSICLasso(2).fit(X, LABELS.astype(float))
    np.testing.assert_allclose(numbers.coef_, floats.coef_, atol=1e-6)
    assert not np.allclose(numbers.coef_, labels.coef_, atol=1e-3)
    # Of two labels it makes no difference.
    two = HSICLasso(2).fit(X, LABELS == 1)
    np.testing.assert_array_equal(
        HSICLasso(2).fit(X, (LABELS == 1) * 5).coef_, two.coef_
    )
    several = HSICLasso(2).fit(X, np.stack([Y, X[:, 0]], axis=1))
    assert several.get_support().sum() == 2


def test_kernels():
    narrow = GaussianKernel(0.5, form="standard")
    selector = HSICLasso(2, kernel_x=narrow, kernel_y=LINEAR).fit(X, Y)
    relevance, redundancy = alignments(
        [centered(gaussian(c, 0.5)) for c in X.T], centered(np.outer(Y, Y))
    )
    np.testing.assert_allclose(selector.relevance_, relevance, atol=2e-6)
    np.testing.assert_allclose(selector.redundancy_, redundancy, atol=2e-6)
    # Features of labels: without a kernel if they are strings.
    codes = np.digitize(X, [-0.5, 0.5])
    delta = HSICLasso(2, kernel_x=DeltaKernel()).fit(codes, Y)
    strings = HSICLasso(2).fit(codes.astype(str), Y)
    np.testing.assert_array_equal(strings.coef_, delta.coef_)
    assert not np.allclose(HSICLasso(2).fit(codes, Y).coef_, delta.coef_, 1e-2)


def test_degenerate_features():
    """Constants are never taken, and units do not matter."""
    x = np.concatenate([X, np.full((60, 2), 1.7e9 + 0.1)], axis=1)
    selector = HSICLasso(9).fit(x, Y)
    assert not selector.get_support()[7:].any()
    assert not selector.redundancy_[7:].any()
    right = HSICLasso(2).fit(X, Y).coef_
    scales = 10.0 ** np.array([300, -300, 0, 20, -20, 5, -5])
    found = HSICLasso(2).fit(X * scales, Y * 1e200 + 1e190).coef_
    np.testing.assert_allclose(found, right, atol=1e-5)
    nothing = HSICLasso(2).fit(X, np.ones(60))
    assert not nothing.get_support().any()
    with pytest.warns(UserWarning, match="No features were selected"):
        assert nothing.transform(X).shape == (60, 0)


@slow_on_jax
def test_in_scikit_learn():
    selector = HSICLasso(2)
    assert isinstance(selector, sklearn.feature_selection.SelectorMixin)
    assert isinstance(selector, HSICLasso)
    assert repr(selector) == "HSICLasso(n_features_to_select=2)"
    names = np.array(["ant", "bee", "cat"])[LABELS]
    logistic = sklearn.linear_model.LogisticRegression()
    pipeline = sklearn.pipeline.make_pipeline(selector, logistic)
    assert pipeline.fit(X, names).score(X, names) > 0.6
    search = sklearn.model_selection.GridSearchCV(
        pipeline, {"hsiclasso__n_features_to_select": [1, 2]}, cv=2
    ).fit(X, names)
    assert search.best_params_ == {"hsiclasso__n_features_to_select": 2}
    cloned = clone(selector)
    assert cloned is not selector
    assert not hasattr(cloned, "coef_")
    for other in (pickle.loads(pickle.dumps(selector)), copy.copy(selector)):
        assert type(other) is type(selector)
        np.testing.assert_array_equal(other.transform(X), X[:, [0, 3]])
    assert selector.get_feature_names_out().tolist() == ["x0", "x3"]
    zeros = selector.inverse_transform(selector.transform(X))
    np.testing.assert_array_equal(zeros[:, [0, 3]], X[:, [0, 3]])
    assert not zeros[:, [1, 2, 4, 5, 6]].any()
    with pytest.raises(sklearn.exceptions.NotFittedError):
        HSICLasso(2).transform(X)

    class Own(HSICLasso):
        """A subclass of a user is a selector, too."""

    own = Own(2)
    assert isinstance(own, Own)
    assert isinstance(own, sklearn.feature_selection.SelectorMixin)


def test_without_scikit_learn(monkeypatch):
    """The class is at hand; its first instance needs the library."""
    lasso._selector.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        HSICLasso(2)
    monkeypatch.undo()
    assert HSICLasso(2).n_features_to_select == 2


def test_errors(capsys):
    for settings, message in (
        ({"n_features_to_select": 0}, "n_features_to_select=0"),
        ({"n_features_to_select": 8}, "n_features_to_select=8"),
        ({"n_features_to_select": 1.5}, "n_features_to_select=1.5"),
        ({"target": "labels"}, "target='labels'"),
        ({"block_size": 1}, "block_size=1"),
        ({"kernel_x": lambda a, b: a}, "kernel_x="),
        ({"kernel_y": PrecomputedKernel()}, "kernel_y="),
    ):
        with pytest.raises(ValueError, match=f"Received: {message}"):
            HSICLasso(**settings).fit(X, Y)
    with pytest.raises(ValueError, match=r"y.shape=\(59, 1\) for n=60"):
        HSICLasso(2).fit(X, Y[:59])
    with pytest.raises(ValueError, match=r"X.shape=\(60,\)"):
        HSICLasso(2).fit(Y, Y)
    with pytest.raises(ValueError, match="finite numbers in `X`"):
        HSICLasso(2).fit(np.where(X > 2, np.nan, X), Y)
    with pytest.raises(ValueError, match="requires y to be passed"):
        HSICLasso(2).fit(X, None)
    with pytest.raises(ValueError, match="sparse input is not supported"):
        HSICLasso(2).fit(scipy.sparse.csr_matrix(X), Y)
    HSICLasso(2, verbose=1).fit(X, Y)
    assert "2/2" in capsys.readouterr().out
