"""The problem of two texts or masses, and the settings of its solver."""

import dataclasses

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_boolean,
    check_choice,
    check_number,
    renamed_value,
)
from blogkeras.transport import exact, measures, soft
from blogkeras.transport.checks import (
    check_mass,
    check_settings,
    check_shape,
    check_words,
    mass_error,
)
from blogkeras.transport.entropic import (
    approximate,
    as_tensor,
    common_dtype,
    length_classes,
    pad_axis,
)

SOLVERS = ("exact", "sinkhorn", "relaxed")


@dataclasses.dataclass(frozen=True)
class Solver:
    """The checked settings of a solver.

    Attributes:
        name: `"exact"`, `"sinkhorn"` or `"relaxed"`.
        regularization: Of `"sinkhorn"`.
        tolerance: Of `"sinkhorn"`.
        unbalanced: ρ, the price of mass that differs from `p` and `q`.
        partial: The share of the mass that is moved.
        debiased: Whether the distance is the Sinkhorn divergence.
    """

    name: str
    regularization: float | None = None
    tolerance: float = 1e-3
    unbalanced: float | None = None
    partial: float | None = None
    debiased: bool = False

    def __post_init__(self):
        check_choice("solver", self.name, SOLVERS)
        regularization, tolerance, _ = check_settings(
            self.regularization, self.tolerance
        )
        unbalanced, partial = self.unbalanced, self.partial
        if unbalanced is not None:
            unbalanced = check_number("unbalanced", unbalanced, above=0)
        if partial is not None:
            partial = check_number("partial", partial, above=0, maximum=1)
        # Convert to plain floats, so that equal settings are equal keys.
        object.__setattr__(self, "regularization", regularization)
        object.__setattr__(self, "tolerance", tolerance)
        object.__setattr__(self, "unbalanced", unbalanced)
        object.__setattr__(self, "partial", partial)
        check_boolean("debiased", self.debiased)
        self._check_fit()

    def _check_fit(self):
        options = {
            "unbalanced": self.unbalanced is not None,
            "partial": self.partial is not None,
            "debiased": self.debiased,
        }
        given = [name for name, is_given in options.items() if is_given]
        if len(given) > 1:
            raise ValueError(
                "Expected at most one of `unbalanced`, `partial` and "
                f"`debiased`. Received: {' and '.join(given)}"
            )
        solvers = ("sinkhorn", "exact") if self.partial else ("sinkhorn",)
        if given and self.name not in solvers:
            raise ValueError(
                f"Expected `solver` to be {' or '.join(map(repr, solvers))} "
                f"with `{given[0]}`. Received: solver={self.name!r}, "
                f"{given[0]}={getattr(self, given[0])!r}"
            )

    def distance(self, p, q, D, own_costs=None):
        """`(...)`: NumPy from NumPy where exact, else a tensor."""
        if self.name == "exact" and isinstance(D, np.ndarray):
            if self.partial is not None:
                return self._of_a_part(np, "distance", p, q, D)
            lead = D.shape[:-2]
            flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
            return exact.solve(*flat)[0].reshape(lead)[()]
        return self.differentiable_distance(p, q, D, own_costs)

    def differentiable_distance(self, p, q, D, own_costs=None):
        """The distance as a tensor with a gradient, as the layers need it."""
        settings = (self.regularization, self.tolerance)
        if 0 in D.shape[:-2]:
            return ops.sum(D, axis=(-2, -1))  # no pairs
        if self.partial is not None:
            return self._of_a_part(ops, "differentiable_distance", p, q, D)
        if self.unbalanced is not None:
            return soft.unbalanced(p, q, D, self.unbalanced, *settings)[0]
        if self.debiased:
            return soft.divergence(p, q, D, own_costs, *settings)
        if self.name == "relaxed":
            return ops.maximum(*measures.relaxed(ops, p, q, D))
        if self.name == "exact" and not backend.is_concrete(D):
            _refuse()
        plan, potentials = self.plan(p, q, D)
        return envelope(plan, potentials, p, q, D)

    def plan(self, p, q, D):
        """`(plan, (f, g))`."""
        if 0 in D.shape[:-2]:
            return 0 * D, (0 * p, 0 * q)  # no pairs
        if self.unbalanced is not None:
            return soft.unbalanced(
                p, q, D, self.unbalanced, self.regularization, self.tolerance
            )[1:]
        if self.partial is not None:
            xp = np if self.name == "exact" else ops
            return self._of_a_part(xp, "plan", p, q, D)
        if self.name == "sinkhorn":
            solution = approximate(p, q, D, self.regularization, self.tolerance)
            return solution.plan, solution.potentials
        p, q, D = (as_array(a, "exact", "float64") for a in (p, q, D))
        lead = D.shape[:-2]
        flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
        _, *solution = exact.solve(*flat, duals=True)
        plan, f, g = (a.reshape((*lead, *a.shape[1:])) for a in solution)
        return plan, (f, g)

    def _of_a_part(self, xp, verb, p, q, D):
        """The same for a share of the mass, as a problem with two more places.

        Each side gets a place that takes the mass which stays: moving there
        costs nothing, and from one to the other more than it is worth.
        """
        share, rest = self.partial, 1 - self.partial
        support = xp.logical_and(p[..., :, None] > 0, q[..., None, :] > 0)
        constant = D if xp is np else ops.stop_gradient(D)
        far = xp.max(xp.abs(constant), axis=(-2, -1), keepdims=True)
        low = xp.where(support, constant, far)
        low = xp.min(low, axis=(-2, -1), keepdims=True)
        high = xp.where(support, constant, -far)
        spread = xp.max(high, axis=(-2, -1), keepdims=True) - low
        spread = xp.where(spread > 0, spread, xp.ones_like(spread))
        ones = xp.ones_like(D[..., :1])
        costs = xp.concatenate([D - low, 0 * ones], axis=-1)
        last = xp.concatenate([0 * D[..., :1, :], spread], axis=-1)
        costs = xp.concatenate([costs, last], axis=-2)
        total = 1 + rest
        p, q = (
            xp.concatenate([z, rest * xp.ones_like(z[..., :1])], axis=-1)
            / total
            for z in (p, q)
        )
        whole = dataclasses.replace(self, partial=None)
        if verb == "plan":
            plan, (f, g) = whole.plan(p, q, costs)
            return total * plan[..., :-1, :-1], (f[..., :-1], g[..., :-1])
        distance = getattr(whole, verb)(p, q, costs)
        return total * distance + share * low[..., 0, 0]


def envelope(plan, potentials, p, q, D):
    """⟨plan, D⟩, with the gradient of the optimum by `D`, `p` and `q`.

    At the optimum the plan and the potentials may be treated as constants: the
    derivative by D is the plan, the derivatives by p and q are the potentials.
    """
    plan, f, g = (
        ops.stop_gradient(ops.cast(a, D.dtype)) for a in (plan, *potentials)
    )
    return (
        ops.sum(plan * D, axis=(-2, -1))
        + ops.sum(f * (p - ops.stop_gradient(p)), axis=-1)
        + ops.sum(g * (q - ops.stop_gradient(q)), axis=-1)
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Two sequences of word vectors, with the options of their problem.

    Attributes:
        x: `(..., n, dim)`.
        y: `(..., m, dim)`.
        x_mask: `(..., n)`, boolean, or `None`.
        y_mask: `(..., m)`, likewise.
        x_mass: `(..., n)`, for `weights` "importance" and "given"; or `None`.
        y_mass: `(..., m)`, likewise.
        cost: One of `measures.COSTS`.
        weights: One of `measures.WEIGHTS`, or "given".
    """

    x: object
    y: object
    x_mask: object
    y_mask: object
    x_mass: object
    y_mass: object
    cost: str
    weights: str

    @classmethod
    def checked(cls, x, y, mask, cost, weights, importance, solver):
        """Arrays that fit, in NumPy for the exact solver, else tensors."""
        weights = renamed_value("weights", weights, measures.OLD_WEIGHTS)
        measures.check_options(cost, weights)
        _, given = measures.given_masses(weights, importance)
        dtype = common_dtype(x, y, *given)
        x, y = (as_array(z, solver, dtype) for z in (x, y))
        lead = max(x.shape[:-2], y.shape[:-2], key=len)
        alone = [len(z.shape) == 2 and len(lead) > 0 for z in (x, y)]
        x, y = (
            _repeated(z, lead) if one else z
            for z, one in zip((x, y), alone, strict=True)
        )
        same = x.shape[:-2] == y.shape[:-2] and x.shape[-1:] == y.shape[-1:]
        if len(x.shape) < 2 or len(x.shape) != len(y.shape) or not same:
            raise ValueError(
                "Expected x (..., n, dim) and y (..., m, dim) with the same "
                f"leading axes. Received: x.shape={tuple(x.shape)}, "
                f"y.shape={tuple(y.shape)}"
            )
        kind = weights if isinstance(weights, str) else "given"
        mask = (None, None) if mask is None else mask
        if not isinstance(mask, (list, tuple)) or len(mask) != 2:
            raise ValueError(
                "Expected `mask` to be a pair, one for each text. "
                f"Received: mask={mask!r}"
            )
        masks, masses = [], []
        for name, z, z_mask, mass, one in zip(
            "xy", (x, y), mask, given, alone, strict=True
        ):
            if z_mask is not None:
                z_mask = as_array(z_mask, solver, "bool")
                z_mask = _repeated(z_mask, lead) if one else z_mask
                check_shape(f"mask of {name}", z_mask, z)
            if mass is not None:
                error = mass_error(mass)
                mass = as_array(mass, solver, dtype)
                mass = _repeated(mass, lead) if one else mass
                check_shape(f"weights of {name}", mass, z)
                check_mass(
                    f"weights of {name}", mass, z_mask, kind == "given", error
                )
            check_words(name, z, z_mask)
            masks.append(z_mask)
            masses.append(mass)
        return cls(x, y, *masks, *masses, cost, kind)

    def arrays(self):
        return (
            self.x,
            self.y,
            self.x_mask,
            self.y_mask,
            self.x_mass,
            self.y_mass,
        )

    def with_arrays(self, arrays):
        return Texts(*arrays, self.cost, self.weights)

    def is_concrete(self):
        return all(a is None or backend.is_concrete(a) for a in self.arrays())

    def padded(self):
        """The same texts, padded with masked words to classes of lengths."""
        n, m = self.x.shape[-2], self.y.shape[-2]
        sizes = length_classes(n, m)
        parts = []
        for z, mask, mass, size in zip(
            (self.x, self.y),
            (self.x_mask, self.y_mask),
            (self.x_mass, self.y_mass),
            sizes,
            strict=True,
        ):
            if mask is None:
                mask = np.ones(z.shape[:-1], "bool")
            if mass is not None:
                mass = pad_axis(mass, -1, size)
            parts.append(
                (pad_axis(z, -2, size), pad_axis(mask, -1, size), mass)
            )
        (x, x_mask, x_mass), (y, y_mask, y_mass) = parts
        return self.with_arrays((x, y, x_mask, y_mask, x_mass, y_mass))

    def measures(self, xp):
        """`((p, x), (q, y))`: masses, and vectors that are zero if masked."""
        return tuple(
            measures.mass_and_vectors(
                xp, z, mask, self.cost, self.weights, mass
            )
            for z, mask, mass in (
                (self.x, self.x_mask, self.x_mass),
                (self.y, self.y_mask, self.y_mass),
            )
        )

    def problem(self, xp, own=False):
        """`(p, q, D)`, and with `own` the pair of costs within each text."""
        (p, x), (q, y) = self.measures(xp)
        D = measures.cost_matrix(xp, x, y, self.cost)
        if not own:
            return p, q, D
        within = (measures.cost_matrix(xp, z, z, self.cost) for z in (x, y))
        return p, q, D, tuple(within)


def _repeated(x, lead):
    """One text as often as there are others to compare it with."""
    xp = np if isinstance(x, np.ndarray) else ops
    return xp.broadcast_to(x, (*lead, *x.shape))


def as_array(x, solver, dtype):
    """NumPy for the exact solver, of float64 for numbers, else a tensor."""
    x = as_numbers(x)
    if solver != "exact":
        return as_tensor(x, dtype)
    if isinstance(x, keras.KerasTensor) or not backend.is_concrete(x):
        # On TensorFlow NumPy arrays are concrete inside a trace.
        if not isinstance(x, (np.ndarray, list, tuple, float, int)):
            _refuse()
    return np.asarray(
        as_numpy(x) if ops.is_tensor(x) else x,
        "bool" if dtype == "bool" else "float64",
    )


def _refuse():
    raise ValueError(
        "The exact solver runs in NumPy, outside of compiled and traced "
        'functions: use solver="sinkhorn" there. Received: solver="exact" '
        "inside a traced function"
    )
