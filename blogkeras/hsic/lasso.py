"""Feature selection by HSIC Lasso, as a selector of scikit-learn."""

import functools
import inspect
import numbers as abstract
import types
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_choice,
    check_integer,
    check_number,
    check_verbose,
)
from blogkeras.extras import require
from blogkeras.hsic.distance_kernels import GaussianKernel
from blogkeras.hsic.grams import Gram
from blogkeras.hsic.independence_test import seed_of
from blogkeras.hsic.kernel import known_numbers
from blogkeras.hsic.kernels import (
    CustomKernel,
    DeltaKernel,
    LinearKernel,
    PrecomputedKernel,
    as_kernel,
    known_labels,
)
from blogkeras.hsic.samples import codes_of, in_deviations, is_categorical
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul
from blogkeras.typing import Tensor

TARGETS = ("auto", "classification", "regression")
# Elements of the kernel matrices of all features that are computed at a time.
TILE = 2**22
# The kernel of the paper, for numbers in standard deviations.
PAPERS = GaussianKernel(1.0, form="standard", per_dimension=True)
_programs = ProgramCache(size=16)


class HSICLasso:
    """Selects the features on which a target depends, and few of them alike.

    With the centered kernel matrices K̄_k of each feature and L̄ of the target,
    each divided by its norm, the non-negative Lasso

        min_{α ≥ 0}  ½ ‖L̄ − Σ_k α_k K̄_k‖² + λ Σ_k α_k
          = ½ − Σ_k α_k CKA(x_k, y) + ½ Σ_kl α_k α_l CKA(x_k, x_l) + λ Σ_k α_k

    is followed from large λ to small (`sklearn.linear_model.lars_path_gram`)
    until as many α_k are positive as are wanted. A feature is taken if the
    target depends on it, in whatever way, and left if those that are taken say
    the same. The problem is convex, and needs no model of the target.

    It is a selector of scikit-learn (`SelectorMixin`), with `transform`,
    `get_support`, `get_feature_names_out`, `set_output` and so on, for
    pipelines and grid searches. scikit-learn is needed to make one:
    `pip install scikit-learn`.

    O(n² d²) products for d features, of which only CKA's d × d matrix stays in
    memory. For many samples give `block_size`: HSIC is then the mean over
    blocks of so many samples, drawn without replacement `num_shuffles` times,
    O(n · block_size · num_shuffles · d²). Computed in float32, compiled.

    Args:
        n_features_to_select: Integer ≥ 1, a share in (0, 1), or `None`: half of
            the features. Fewer are selected where no other improves the fit.
        target: `"classification"`, `"regression"`, or `"auto"`: strings,
            booleans and labels of two kinds are classes, floats are numbers.
            For other integers you have to say it.
        kernel_x: A kernel of each single feature, no function. `None` is the
            paper's, the standard Gaussian with a bandwidth of one standard
            deviation, and `DeltaKernel()` for strings.
        kernel_y: A kernel of the target. `None` is the paper's: for numbers as
            above, and for two samples of a class of m samples 1/m, so that each
            class counts alike.
        block_size: Integer ≥ 2, or `None`: all samples at once.
        num_shuffles: Integer ≥ 1.
        seed: Integer, which blocks are drawn by; `None` draws one, which
            `keras.utils.set_random_seed` decides.
        verbose: 1 shows a progress bar.

    Attributes:
        coef_: `(n_features,)`, α where the path ends; 0 for features that are
            not selected.
        ranking_: `(n_features,)`, integers: 1 for the feature that entered
            first; features that did not enter share the last rank.
        relevance_: `(n_features,)`, CKA of each feature with the target.
        redundancy_: `(n_features, n_features)`, CKA of the features.
        n_features_in_: Integer.
        feature_names_in_: The names of columns, where there are any.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: in `fit`, on arguments out of range, NaN or infinity,
            different numbers of samples, and on integers as a target without
            `target`.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> y = np.sin(2 * x[:, 1]) + x[:, 4] ** 2
    >>> selector = HSICLasso(2).fit(x, y)
    >>> selector.get_support(indices=True).tolist()
    [1, 4]
    >>> selector.transform(x).shape
    (100, 2)

    Departs from the paper:
        There is no n² × d matrix: the Lasso needs inner products only. In
        blocks, the sums of the blocks' HSIC are normalized, and not each block.

    Reference:
        [Yamada et al., 2014](https://arxiv.org/abs/1202.0515);
        [Climente-González et al., 2019](https://doi.org/10.1093/bioinformatics/btz333)
        (blocks)
    """

    def __new__(cls, *args, **kwargs):
        # scikit-learn is not needed before: `import blogkeras` is to be light.
        return object.__new__(_selector(cls))

    def __init__(
        self,
        n_features_to_select: int | float | None = None,
        *,
        target: str = "auto",
        kernel_x: Any = None,
        kernel_y: Any = None,
        block_size: int | None = None,
        num_shuffles: int = 3,
        seed: int | None = None,
        verbose: str | int = 0,
    ) -> None:
        # Estimators of scikit-learn keep their arguments as they are given,
        # and check them in `fit`.
        self.n_features_to_select = n_features_to_select
        self.target = target
        self.kernel_x = kernel_x
        self.kernel_y = kernel_y
        self.block_size = block_size
        self.num_shuffles = num_shuffles
        self.seed = seed
        self.verbose = verbose

    def __reduce__(self):
        # The class that `_selector` makes has no place to be found in.
        public = type(self).__mro__[1] if _is_made(type(self)) else type(self)
        return _new, (public,), self.__getstate__()

    def fit(self, X: Any, y: Tensor) -> "HSICLasso":  # noqa: N803
        """Selects features.

        Args:
            X: `(n, n_features)`, numbers, or strings in all columns.
            y: `(n,)`, labels or numbers, or `(n, dim)`, numbers.

        Returns:
            The selector itself.
        """
        check_choice("target", self.target, TARGETS)
        shuffles = check_integer("num_shuffles", self.num_shuffles, minimum=1)
        verbose = check_verbose(self.verbose)
        if self.seed is not None:
            check_integer("seed", self.seed, minimum=0)
        features = _features(X, self.kernel_x)
        d, n = features.features.shape[:2]
        wanted = _count(self.n_features_to_select, d)
        target = _target(y, n, self.target, self.kernel_y)
        blocks = [np.arange(n)]
        size = self.block_size
        if size is not None:
            size = check_integer("block_size", size, minimum=2)
        if size is not None and size < n:
            rng = np.random.default_rng(seed_of(self.seed))
            blocks = [
                block
                for _ in range(shuffles)
                for block in _blocks(rng.permutation(n), size)
            ]
        products = _inner_products([features, target], blocks, verbose)
        self.relevance_, self.redundancy_ = _alignments(products)
        self.coef_, self.ranking_ = _path(
            self.relevance_, self.redundancy_, wanted
        )
        self.n_features_in_ = d
        names = getattr(X, "columns", None)
        if names is not None and all(isinstance(name, str) for name in names):
            self.feature_names_in_ = np.asarray(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def _get_support_mask(self):
        require("sklearn.utils.validation").check_is_fitted(self, "coef_")
        return self.coef_ > 0

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags


# The arguments are those of `__init__`, not those of `__new__`.
_, *_arguments = inspect.signature(HSICLasso.__init__).parameters.values()
HSICLasso.__signature__ = inspect.Signature(_arguments)  # type: ignore


@functools.cache
def _selector(cls):
    """`cls` with the methods of scikit-learn's selectors, of the same name."""
    base = require("sklearn.base")
    selection = require("sklearn.feature_selection")
    bases = cls, selection.SelectorMixin, base.BaseEstimator
    if issubclass(cls, selection.SelectorMixin):
        return cls
    members = {
        name: getattr(cls, name)
        for name in ("__module__", "__qualname__", "__doc__")
    }
    members["_made_by_selector"] = True
    return types.new_class(
        cls.__name__, bases, exec_body=lambda body: body.update(members)
    )


def _is_made(cls):
    return "_made_by_selector" in vars(cls)


def _new(cls):
    return cls.__new__(cls)


def _own_kernel(name, kernel):
    """A kernel that computes the matrices of many features at once."""
    kernel = as_kernel(kernel)
    if isinstance(kernel, (CustomKernel, PrecomputedKernel)):
        raise ValueError(
            f"Expected `{name}` to be a kernel of blogkeras that computes a "
            f"matrix from data. Received: {name}={kernel!r}"
        )
    return kernel


def _features(x, kernel):
    """The `Gram` of all features, `(d, n, 1)`: a sample set for each."""
    if hasattr(x, "toarray"):
        raise ValueError(
            "Expected a dense `X`: sparse input is not supported, give "
            f"X.toarray(). Received: {type(x).__name__}"
        )
    strings = is_categorical(x)
    x = np.asarray(x)
    if x.ndim != 2 or not x.size:
        raise ValueError(
            "Expected `X` of shape (n, n_features). Received: "
            f"X.shape={x.shape}"
        )
    x = x.T[..., None]
    if kernel is not None:
        kernel = _own_kernel("kernel_x", kernel)
    elif strings:
        kernel = DeltaKernel()
    else:
        x = known_numbers("X", x, None).astype("float64")
        kernel, x = PAPERS, in_deviations(x)
    return kernel.of_array("X", x, None, "float32")


def _target(y, n, target, kernel):
    """The `Gram` of the target, `(1, n, dim)`."""
    if y is None:
        raise ValueError(
            "Expected a target: HSICLasso requires y to be passed, but the "
            "target y is None. Received: y=None"
        )
    strings = is_categorical(y)
    y = known_labels("y", y)
    if y.ndim != 2 or len(y) != n:
        raise ValueError(
            "Expected as many samples of `y` as of `X`, (n,) or (n, dim). "
            f"Received: y.shape={y.shape} for n={n}"
        )
    if kernel is not None:
        kernel = _own_kernel("kernel_y", kernel)
        return kernel.of_array("y", y[None], None, "float32")
    if target == "auto":
        two = y.shape[1] == 1 and len(np.unique(codes_of(y))) <= 2
        if strings or two or y.dtype.kind == "b":
            target = "classification"
        elif y.dtype.kind == "f":
            target = "regression"
        else:
            raise ValueError(
                "Expected target='classification' or target='regression': "
                "integers may be classes or numbers. Received: "
                f"target='auto' and y of dtype {y.dtype}"
            )
    if target == "regression":
        y = known_numbers("y", y, None).astype("float64")
        y = in_deviations(y)[None]
        return PAPERS.of_array("y", y, None, "float32")
    codes = codes_of(y)
    counts = np.bincount(codes)
    # x·x' is 1/m for two samples of a class of m, else 0.
    one_hot = np.eye(len(counts))[codes] / np.sqrt(counts[codes])[:, None]
    return LinearKernel().of_array("y", one_hot[None], None, "float32")


def _count(number, d):
    """How many features of `d` are wanted."""
    name = "n_features_to_select"
    if number is None:
        return max(1, d // 2)
    if isinstance(number, abstract.Integral):
        return check_integer(name, number, minimum=1, maximum=d)
    share = check_number(name, number, above=0, below=1)
    return max(1, int(share * d))


def _blocks(order, size):
    """Blocks of equal size; samples that do not fill one are left out."""
    count = len(order) // size
    return list(order[: count * size].reshape(count, size))


def _inner_products(grams, blocks, verbose):
    """Σ_ij K̄_ij L̄_ij of all pairs, and Σ_ij K_ij² of each: float64 arrays.

    A kernel matrix is centered by its rows' means, which are computed first.
    """
    kernels = tuple(gram.kernel for gram in grams)
    size, d = len(blocks[0]), sum(g.features.shape[0] for g in grams)
    rows = max(1, min(size, TILE // (size * d)))
    key = kernels, size, rows, *(tuple(g.features.shape) for g in grams)
    means_of, products_of = _programs.get(
        key,
        lambda: [
            backend.jit(functools.partial(fn, kernels))
            for fn in (_row_means, _tile_products)
        ],
    )
    starts = range(0, size, rows)
    progress = keras.utils.Progbar(
        2 * len(blocks) * len(starts), verbose=verbose, unit_name="tile"
    )
    total = np.zeros((d, d))
    for block in blocks:
        block = ops.convert_to_tensor(block.astype("int32"))
        features = [ops.take(g.features, block, axis=1) for g in grams]
        tiles = []
        for start in starts:
            index = np.arange(start, start + rows)
            inside = (index < size).astype("float32")
            index = np.minimum(index, size - 1).astype("int32")
            tiles.append([*map(ops.convert_to_tensor, (index, inside))])
        means = []
        for index, _ in tiles:
            means.append(ops.convert_to_numpy(means_of(index, *features)))
            progress.add(1)
        means = np.concatenate(means, axis=1)[:, :size]
        means = ops.convert_to_tensor(means)
        for index, inside in tiles:
            products = products_of(index, inside, means, *features)
            total += ops.convert_to_numpy(products)
            progress.add(1)
    return total


def _rows(kernels, index, features):
    """Rows of all kernel matrices, `(d, rows, n)`."""
    rows = [
        Gram(kernel, x, "float32").rows(index)
        for kernel, x in zip(kernels, features, strict=True)
    ]
    return ops.concatenate(rows, axis=0)


# The first entry is subtracted from everything before it is centered, so that
# of a constant feature exactly 0 is left.


def _row_means(kernels, index, *features):
    rows = _rows(kernels, index, features)
    first = rows[..., :1]
    return (first + ops.mean(rows - first, axis=-1, keepdims=True))[..., 0]


def _tile_products(kernels, index, inside, means, *features):
    rows = _rows(kernels, index, features)
    first = rows[..., :1]
    own = ops.take(means, index, axis=1)[..., None]
    others = means - means[:, :1]
    others = others - ops.mean(others, axis=1, keepdims=True)
    centered = (rows - first) - (own - first) - others[:, None]
    flat = ops.reshape(centered * inside[:, None], [rows.shape[0], -1])
    return full_precision_matmul(flat, ops.transpose(flat))


def _alignments(products):
    """CKA of the features with the target, and with each other."""
    own = np.diag(products)
    norm = np.sqrt(own)
    scale = norm[:, None] * norm
    cka = np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0)
    cka = (cka + cka.T) / 2
    return cka[:-1, -1], cka[:-1, :-1]


def _path(relevance, redundancy, wanted):
    """α where `wanted` features are positive, and the order of entering."""
    linear_model = require("sklearn.linear_model")
    exceptions = require("sklearn.exceptions")
    d = len(relevance)
    coefficients, ranking = np.zeros(d), np.zeros(d, int)
    used = np.flatnonzero(np.diag(redundancy) > 0)
    steps, finished = wanted + 8, not len(used)
    while not finished:
        with warnings.catch_warnings():
            # A copy of another feature is dropped, as it should be.
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
            *_, path, iterations = linear_model.lars_path_gram(
                relevance[used],
                redundancy[np.ix_(used, used)],
                n_samples=1,
                positive=True,
                method="lasso",
                max_iter=steps,
                return_n_iter=True,
            )
        count = (path > 0).sum(axis=0)
        enough = np.flatnonzero(count >= wanted)
        finished = len(enough) > 0 or iterations < steps
        steps *= 2
        if finished:
            last = enough[0] if len(enough) else path.shape[1] - 1
            path = path[:, : last + 1]
            coefficients[used] = np.maximum(path[:, -1], 0)
            for index in range(last + 1):
                entered = used[path[:, index] > 0]
                new = entered[ranking[entered] == 0]
                ranking[new] = ranking.max() + 1 + np.arange(len(new))
    ranking[ranking == 0] = ranking.max() + 1
    return coefficients, ranking
