"""The distances of post 7388 as Keras layers."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    check_boolean,
    check_choice,
    renamed_value,
    shapes_agree,
)
from blogkeras.transport import measures
from blogkeras.transport.problem import Solver


class _TransportLayer(keras.layers.Layer):
    """The base class of `WordMoverDistance` and `WordRotatorDistance`."""

    def __init__(
        self,
        cost,
        weighting,
        solver,
        regularization,
        tolerance,
        pairwise,
        options,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.cost = check_choice("cost", cost, measures.COSTS)
        weighting = renamed_value("weighting", weighting, measures.OLD_WEIGHTS)
        if not isinstance(weighting, str):
            raise ValueError(
                "Expected `weighting` to be one of "
                f"{', '.join(map(repr, measures.WEIGHTS))}; weights of your "
                'own go in with weighting="importance", as '
                "[x, y, x_importance, y_importance]. "
                f"Received: weighting={weighting!r}"
            )
        self.weighting = check_choice("weighting", weighting, measures.WEIGHTS)
        self._solver = Solver(solver, regularization, tolerance, *options)
        self.solver = self._solver.name
        self.regularization = self._solver.regularization
        self.tolerance = self._solver.tolerance
        self.unbalanced = self._solver.unbalanced
        self.partial = self._solver.partial
        self.debiased = self._solver.debiased
        self.pairwise = check_boolean("pairwise", pairwise)
        self.supports_masking = True

    def build(self, input_shape):
        self._check_shapes(input_shape)
        super().build(input_shape)

    def _check_shapes(self, shapes):
        # One tensor alone has sizes here, and None has no shape.
        shapes = [
            tuple(shape) if hasattr(shape, "__len__") else shape
            for shape in shapes
        ]
        count = 4 if self.weighting == "importance" else 2
        fits = len(shapes) == count
        fits = fits and all(isinstance(shape, tuple) for shape in shapes)
        fits = fits and len(shapes[0]) == len(shapes[1]) == 3
        if fits:
            (a, _, dim_x), (b, _, dim_y) = shapes[:2]
            fits = shapes_agree((dim_x,), (dim_y,))
            fits = fits and (self.pairwise or shapes_agree((a,), (b,)))
            fits = fits and all(
                shapes_agree(weights, words[:2])
                for words, weights in zip(shapes[:2], shapes[2:], strict=False)
            )
        if not fits:
            raise ValueError(
                "Expected the inputs [x, y] of shape (batch, length, dim), "
                'and, with weighting="importance" only, x_importance and '
                "y_importance of shape (batch, length) after them. "
                f"Received: input_shape={shapes}"
            )

    def call(self, inputs, mask=None):
        # The layer is built once, but may be called with any shapes.
        self._check_shapes([getattr(z, "shape", None) for z in inputs])
        # Marginals need more digits than half precision has.
        x, y, *importance = (
            ops.cast(z, keras.backend.result_type(z.dtype, "float32"))
            for z in inputs
        )
        kind = self.weighting
        importance = importance or (None, None)
        masks = _pair_of_masks(mask, inputs)
        p, x = measures.mass_and_vectors(
            ops, x, masks[0], self.cost, kind, importance[0]
        )
        q, y = measures.mass_and_vectors(
            ops, y, masks[1], self.cost, kind, importance[1]
        )
        if not self.pairwise:
            d = measures.cost_matrix(ops, x, y, self.cost)
            distance = self._solver.differentiable_distance(
                p, q, d, self._own_costs(x, y)
            )
        else:
            distance = self._all_pairs(p, q, x, y)
        return ops.cast(distance, self.compute_dtype)

    def _all_pairs(self, p, q, x, y):
        (a, n, dim), (b, m, _) = ops.shape(x), ops.shape(y)
        d = measures.cost_matrix(
            ops,
            ops.reshape(x, (a * n, dim)),
            ops.reshape(y, (b * m, dim)),
            self.cost,
        )
        d = ops.transpose(ops.reshape(d, (a, n, b, m)), (0, 2, 1, 3))
        p = ops.broadcast_to(p[:, None], (a, b, n))
        q = ops.broadcast_to(q[None], (a, b, m))
        flat = [
            ops.reshape(p, (a * b, n)),
            ops.reshape(q, (a * b, m)),
            ops.reshape(d, (a * b, n, m)),
        ]
        own = self._own_costs(x, y)
        if own is not None:
            first = ops.broadcast_to(own[0][:, None], (a, b, n, n))
            second = ops.broadcast_to(own[1][None], (a, b, m, m))
            own = (
                ops.reshape(first, (a * b, n, n)),
                ops.reshape(second, (a * b, m, m)),
            )
        distance = self._solver.differentiable_distance(*flat, own)
        return ops.reshape(distance, (a, b))

    def _own_costs(self, x, y):
        """The costs within each text, for the divergence alone."""
        if not self.debiased:
            return None
        return tuple(measures.cost_matrix(ops, z, z, self.cost) for z in (x, y))

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def compute_output_shape(self, input_shape):
        x, y = input_shape[:2]
        return (x[0], y[0]) if self.pairwise else (x[0],)

    def get_config(self):
        return {
            **super().get_config(),
            "cost": self.cost,
            "weighting": self.weighting,
            "solver": self.solver,
            "regularization": self.regularization,
            "tolerance": self.tolerance,
            "pairwise": self.pairwise,
            "unbalanced": self.unbalanced,
            "partial": self.partial,
            "debiased": self.debiased,
        }


def _pair_of_masks(mask, inputs):
    """The masks of x and y, booleans or `None`."""
    if mask is None:
        return None, None
    words = [tuple(z.shape[:2]) for z in inputs[:2]]
    pair, shapes = (), type(mask).__name__
    if isinstance(mask, (list, tuple)):
        # Keras has a mask for the importance of the words, too.
        if len(mask) in (2, len(inputs)):
            pair = [
                None if m is None else ops.cast(m, "bool") for m in mask[:2]
            ]
        shapes = [None if m is None else tuple(np.shape(m)) for m in mask]
    if not pair or not all(
        m is None or shapes_agree(tuple(m.shape), shape)
        for m, shape in zip(pair, words, strict=True)
    ):
        raise ValueError(
            "Expected `mask` to be a pair [x_mask, y_mask] of None or booleans "
            f"of shapes {words[0]} and {words[1]}. Received: {shapes}"
        )
    return pair


@keras.saving.register_keras_serializable(package="blogkeras")
class WordMoverDistance(_TransportLayer):
    """Word mover's distance between two sequences of vectors, differentiable.

        WMD = min_γ Σ γᵢⱼ ‖wᵢ − w'ⱼ‖   with  Σⱼ γᵢⱼ = pᵢ,  Σᵢ γᵢⱼ = qⱼ,  γ ≥ 0

    The distance and its gradient come from Sinkhorn's iteration: the distance
    is an upper bound, typically within 1 % (see
    `sinkhorn` for the certified gap); the gradient is that of the regularized
    optimum at this ε: the plan and the potentials, taken as constant. It is
    finite at equal words and at zero vectors. Everything is computed in float32
    at least.

    Masked words have no mass, and their values have no influence. An empty or
    fully masked sequence counts as one zero vector.

    Args:
        cost: `"euclidean"`, `"cosine"` or `"rms"`, Euclidean divided by √dim.
        weighting: Masses of the words, divided by their sum: `"uniform"`, 1;
            `"norm"`, ‖w‖; `"importance"`, given as two more inputs, such as
            the inverse document frequencies of the words, differentiable.
            Negative ones count as 0.
        solver: `"sinkhorn"`; `"relaxed"`, the lower bound RWMD; `"exact"`, for
            calls with values only: not in a compiled step nor, on JAX, under a
            gradient.
        regularization: Float > 0. The ε of Sinkhorn, relative to the largest
            cost of each pair. Larger is faster, smoother and less accurate.
            `None`: 0.005, and less where that is far off, see `sinkhorn`.
        tolerance: Float > 0. Marginal error at which Sinkhorn stops.
        pairwise: Boolean. Whether every x of the batch is compared with every
            y, for in-batch negatives. Takes batch² · n · m numbers. Under
            `tf.distribute` the batch is that of a replica.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Words may lose
            mass and get more at the price ρ KL(γ1 ‖ p) + ρ KL(γᵀ1 ‖ q).
        partial: Float within (0, 1], or `None`. The share of the mass that is
            moved, at the least cost.
        debiased: Boolean. The debiased Sinkhorn divergence, 0 between equal
            texts; by default its ε is 0.05, relative to the largest of the
            costs between and within the texts.

    Input shape: `[x, y]` of `(batch, n, dim)` and `(batch, m, dim)`; with
        `weighting="importance"` `[x, y, x_importance, y_importance]`, the
        latter two `(batch, n)` and `(batch, m)`. With `pairwise=True` the
        batches may differ.
    Output shape: `(batch,)`; with `pairwise=True` `(batch_x, batch_y)`.

    Raises:
        ValueError: on an unknown `cost`, `weighting` or `solver`, on numbers
            out of range, and on inputs of other shapes.

    Example:

    >>> tokens = [keras.Input((None,), dtype="int32") for _ in range(2)]
    >>> embedding = keras.layers.Embedding(100, 16, mask_zero=True)
    >>> distance = WordMoverDistance()([embedding(t) for t in tokens])
    >>> model = keras.Model(tokens, distance)

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf);
        [blog post](https://kexue.fm/archives/7388)
    """

    def __init__(
        self,
        cost: str = "euclidean",
        weighting: str = "uniform",
        solver: str = "sinkhorn",
        regularization: float | None = None,
        tolerance: float = 1e-3,
        pairwise: bool = False,
        unbalanced: float | None = None,
        partial: float | None = None,
        debiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            cost,
            weighting,
            solver,
            regularization,
            tolerance,
            pairwise,
            (unbalanced, partial, debiased),
            **kwargs,
        )


@keras.saving.register_keras_serializable(package="blogkeras")
class WordRotatorDistance(_TransportLayer):
    """Word rotator's distance between two sequences of vectors, differentiable.

        WRD = min_γ Σ γᵢⱼ (1 − cos(wᵢ, w'ⱼ))
        with  Σⱼ γᵢⱼ = ‖wᵢ‖/Z,  Σᵢ γᵢⱼ = ‖w'ⱼ‖/Z',  γ ≥ 0

    `WordMoverDistance` with other defaults. Between 0 and 2; 1 − WRD is the
    post's similarity. The gradient passes through the costs and through the
    norms that weigh the words. A zero vector has no mass, nor has a
    masked word; an empty or fully masked sequence has the distance 1 to a text.

    Args:
        cost: `"cosine"`, `"euclidean"` or `"rms"`, Euclidean divided by √dim.
        weighting: Masses of the words, divided by their sum: `"norm"`, ‖w‖;
            `"uniform"`, 1; `"importance"`, given as two more inputs.
        solver: `"sinkhorn"`; `"relaxed"`, a lower bound; `"exact"`, for calls
            with values only.
        regularization: Float > 0. The ε of Sinkhorn, relative to the largest
            cost of each pair, or `None` for what `sinkhorn` chooses.
        tolerance: Float > 0. Marginal error at which Sinkhorn stops.
        pairwise: Boolean. Whether every x of the batch is compared with every
            y, for in-batch negatives.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Words may lose
            mass and get more at the price ρ KL(γ1 ‖ p) + ρ KL(γᵀ1 ‖ q).
        partial: Float within (0, 1], or `None`. The share of the mass that is
            moved, at the least cost.
        debiased: Boolean. The debiased Sinkhorn divergence, 0 between equal
            texts; by default its ε is 0.05, relative to the largest of the
            costs between and within the texts.

    Input shape: `[x, y]` of `(batch, n, dim)` and `(batch, m, dim)`; with
        `weighting="importance"` `[x, y, x_importance, y_importance]`, the
        latter two `(batch, n)` and `(batch, m)`.
    Output shape: `(batch,)`; with `pairwise=True` `(batch_x, batch_y)`.

    Raises:
        ValueError: on an unknown `cost`, `weighting` or `solver`, on numbers
            out of range, and on inputs of other shapes.

    Example:

    >>> x = np.array([[[2.0, 0.0]]])
    >>> y = np.array([[[0.0, 3.0], [3.0, 0.0]]])
    >>> float(WordRotatorDistance()([x, y])[0])
    0.5

    Reference:
        [Yokoi et al., 2020](https://arxiv.org/abs/2004.15003);
        [blog post](https://kexue.fm/archives/7388)
    """

    def __init__(
        self,
        cost: str = "cosine",
        weighting: str = "norm",
        solver: str = "sinkhorn",
        regularization: float | None = None,
        tolerance: float = 1e-3,
        pairwise: bool = False,
        unbalanced: float | None = None,
        partial: float | None = None,
        debiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            cost,
            weighting,
            solver,
            regularization,
            tolerance,
            pairwise,
            (unbalanced, partial, debiased),
            **kwargs,
        )
