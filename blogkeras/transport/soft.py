"""Entropic problems in the log domain: relaxed marginals, divergences."""

from keras import ops

from blogkeras import backend
from blogkeras.loops import ProgramCache
from blogkeras.transport.entropic import cut_axes, length_classes, pad_axis

_REGULARIZATION = 0.005  # of relaxed marginals, in units of max|D|
_DEBIASED = 0.05  # of a divergence, whose bias is taken away
_FALL = 0.8  # from one ε to the next, one for each iteration
_MAX_ITERATIONS = 5000
_LARGEST = 50.0  # exponent of an error
_FAR = 1e30
_programs = ProgramCache(size=16)


def divergence(p, q, D, own_costs, regularization, tolerance):
    """The debiased Sinkhorn divergence, with its gradient.

    With V the optimum of ⟨γ, D⟩ + ε KL(γ ‖ p ⊗ q):

        V(p, q, D) − ½ V(p, p, Dₚₚ) − ½ V(q, q, D_qq)

    All three have the same ε, relative to the largest cost of the three.
    """
    costs = (D, *own_costs)
    masses = ((p, q), (p, p), (q, q))
    largest = [
        largest_cost(a, b, c) for (a, b), c in zip(masses, costs, strict=True)
    ]
    epsilon = (regularization or _DEBIASED) * ops.maximum(
        ops.maximum(largest[0], largest[1]), largest[2]
    )
    values = []
    for (a, b), c in zip(masses, costs, strict=True):
        f, g = potentials(a, b, c, epsilon, None, tolerance, c is not D)
        values.append(_dual_value(a, b, c, f, g, epsilon))
    return values[0] - (values[1] + values[2]) / 2


def unbalanced(p, q, D, penalty, regularization, tolerance):
    """`(distance, plan, (f, g))` with marginals that may differ from p and q.

    By Sinkhorn's iteration, in which the potentials are shifted against each
    other to where the dual problem is best (Séjourné et al., 2022).

    The distance is ⟨γ, D⟩ + ρ KL(γ1 ‖ p) + ρ KL(γᵀ1 ‖ q) of the plan γ that
    minimizes this plus ε KL(γ ‖ p ⊗ q). Every plan is admissible, so it is an
    upper bound of the minimum without ε.

    The iteration stops with an error δ of the marginals, which costs about
    ρ δ²: of a large ρ more than the transport. So of two plans the cheaper one
    is taken, the second with the marginals of the optimum, p exp(−f/ρ) and
    q exp(−g/ρ).
    """
    epsilon = (regularization or _REGULARIZATION) * largest_cost(p, q, D)
    f, g = potentials(p, q, D, epsilon, penalty, tolerance)
    masses = [ops.stop_gradient(p), ops.stop_gradient(q)]
    costs = ops.stop_gradient(D)
    plan = _plan(*masses, costs, f, g, epsilon)

    def price(plan, excess):
        losses = [_kl(a, t) for a, t in zip(masses, excess, strict=True)]
        transport = ops.sum(ops.sum(plan * costs, axis=-1), axis=-1)
        return transport + penalty * sum(losses)

    # By how much the marginals exceed p and q, in units of these.
    excess = [
        (ops.sum(plan, axis=axis) - a) / ops.where(a > 0, a, 1.0)
        for a, axis in zip(masses, (-1, -2), strict=True)
    ]
    best = [
        ops.where(a > 0, ops.expm1(-z / penalty), -1.0)
        for a, z in zip(masses, (f[..., 0], g[..., 0, :]), strict=True)
    ]
    rounded = _with_marginals(
        plan, *(a * (1 + t) for a, t in zip(masses, best, strict=True))
    )
    prices = price(plan, excess), price(rounded, best)
    cheaper = prices[1] < prices[0]
    plan = ops.where(cheaper[..., None, None], rounded, plan)
    distance = ops.where(cheaper, prices[1], prices[0])
    # At the optimum the derivative by D is the plan, that by p is
    # ρ (1 − exp(−f/ρ)), of a large ρ the potential.
    distance += ops.sum(ops.sum(plan * (D - costs), axis=-1), axis=-1)
    for mass, constant, t in zip((p, q), masses, best, strict=True):
        distance -= penalty * ops.sum(t * (mass - constant), axis=-1)
    return distance, plan, (f[..., 0], g[..., 0, :])


def largest_cost(p, q, D):
    """max|D| between words with mass, at least a tiny number: `(..., 1, 1)`."""
    support = ops.logical_and(p[..., :, None] > 0, q[..., None, :] > 0)
    sizes = ops.where(support, ops.abs(D), ops.zeros_like(D))
    largest = ops.max(sizes, axis=(-2, -1), keepdims=True)
    return ops.stop_gradient(ops.maximum(largest, 1e-30))


def potentials(p, q, D, epsilon, penalty, tolerance, symmetric=False):
    """The potentials `(..., n, 1)` and `(..., 1, m)`, without a gradient.

    Args:
        p: `(..., n)`.
        q: `(..., m)`; p where `symmetric`.
        D: `(..., n, m)`; equal to its transpose where `symmetric`.
        epsilon: `(..., 1, 1)`.
        penalty: Float, ρ of the relaxed marginals; `None`: exact ones.
        tolerance: Float. Marginal error to stop at.
        symmetric: Boolean.
    """
    arrays = [ops.stop_gradient(a) for a in (p, q, D, epsilon)]
    settings = (penalty, tolerance, symmetric)
    if not all(map(backend.is_concrete, arrays)):
        return _iterate(*arrays, *settings)
    p, q, D, epsilon = arrays
    n, m = D.shape[-2:]
    rows, columns = length_classes(n, m)
    p, q = pad_axis(p, -1, rows), pad_axis(q, -1, columns)
    D = pad_axis(pad_axis(D, -2, rows), -1, columns)
    program = _programs.get(
        (tuple(D.shape), str(D.dtype), settings),
        lambda: backend.jit(lambda *arrays: _iterate(*arrays, *settings)),
    )
    f, g = program(p, q, D, epsilon)
    return cut_axes(f, n, 1), cut_axes(g, m)


def _iterate(p, q, D, epsilon, penalty, tolerance, symmetric):
    p, q = p[..., :, None], q[..., None, :]
    rows, columns = p > 0, q > 0
    log_p, log_q = (
        ops.where(
            used,
            ops.log(ops.where(used, mass, ops.ones_like(mass))),
            -_FAR * ops.ones_like(mass),
        )
        for used, mass in ((rows, p), (columns, q))
    )
    start = ops.maximum(largest_cost(p[..., 0], q[..., 0, :], D), epsilon)

    def transform(potential, log_mass, axis, here, smoothing):
        z = (potential - D) / smoothing + log_mass
        new = -smoothing * ops.logsumexp(z, axis=axis, keepdims=True)
        if penalty is not None:
            new = new * (penalty / (penalty + smoothing))
        return ops.where(here, new, ops.zeros_like(new))

    def excess(potential, mass):
        """log Σ p exp(−f/ρ), of which both sides have the same at the end."""
        z = ops.where(mass > 0, -potential / penalty, -_FAR)
        most = ops.max(z, axis=(-2, -1), keepdims=True)
        total, change = (
            ops.sum(mass * fn(z - most), axis=(-2, -1), keepdims=True)
            for fn in (ops.exp, ops.expm1)
        )
        # A large ρ multiplies the rounding of a sum near 1.
        return most + ops.where(
            change > -0.5, ops.log1p(ops.maximum(change, -0.5)), ops.log(total)
        )

    def unfinished(iterations, smoothing, error, *_):
        left = ops.logical_or(
            ops.any(error > tolerance), ops.any(smoothing > epsilon)
        )
        return ops.logical_and(iterations < _MAX_ITERATIONS, left)

    def repeat(iterations, smoothing, error, f, g):
        smoothing = ops.maximum(smoothing * _FALL, epsilon)
        new = transform(g, log_q, -1, rows, smoothing)
        change = ops.minimum(ops.abs(f - new) / smoothing, _LARGEST)
        error = ops.max(ops.sum(p * ops.expm1(change), axis=-2))
        if symmetric:
            # The mean of both: it converges in a few iterations.
            f = (f + new) / 2
            g = ops.swapaxes(f, -1, -2)
        else:
            f = new
            g = transform(f, log_p, -2, columns, smoothing)
        if penalty is not None:
            # Without this a constant would go from f to g in tiny steps.
            shift = 0.5 * penalty * (excess(f, p) - excess(g, q))
            f = ops.where(rows, f + shift, f)
            g = ops.where(columns, g - shift, g)
        return iterations + 1, smoothing, error, f, g

    f, g = ops.zeros_like(D[..., :1]), ops.zeros_like(D[..., :1, :])
    first = ops.cast(_LARGEST, D.dtype) * ops.ones_like(ops.max(D))
    *_, f, g = ops.while_loop(unfinished, repeat, (0, start, first, f, g))
    return f, g


def _plan(p, q, D, f, g, epsilon):
    mass = p[..., :, None] * q[..., None, :]
    return mass * ops.exp(_exponent(mass, D, f, g, epsilon))


def _exponent(mass, D, f, g, epsilon):
    exponent = (f + g - D) / epsilon
    return ops.where(mass > 0, exponent, ops.zeros_like(exponent))


def _dual_value(p, q, D, f, g, epsilon):
    """Σ p f + Σ q g − ε Σ p q (exp((f + g − D)/ε) − 1).

    At the optimum its derivative by the potentials is zero. With these as
    constants it therefore has the gradient of the optimum, and an error of
    second order.
    """
    f, g = ops.stop_gradient(f), ops.stop_gradient(g)
    mass = p[..., :, None] * q[..., None, :]
    excess = mass * ops.expm1(_exponent(mass, D, f, g, epsilon))
    return (
        ops.sum(p * f[..., 0], axis=-1)
        + ops.sum(q * g[..., 0, :], axis=-1)
        - epsilon[..., 0, 0] * ops.sum(ops.sum(excess, axis=-1), axis=-1)
    )


def _with_marginals(plan, p, q):
    """The plan, made to have these sums (Altschuler et al., algorithm 2).

    Rows and columns are scaled down to at most their sum; then the missing mass
    is spread over all.
    """
    p, q = p[..., :, None], q[..., None, :]
    for mass, axis in ((p, -1), (q, -2)):
        sums = ops.maximum(ops.sum(plan, axis=axis, keepdims=True), mass)
        plan = plan * (mass / ops.where(sums > 0, sums, 1.0))
    rows = ops.maximum(p - ops.sum(plan, axis=-1, keepdims=True), 0)
    columns = ops.maximum(q - ops.sum(plan, axis=-2, keepdims=True), 0)
    missing = ops.maximum(
        ops.sum(rows, axis=-2, keepdims=True),
        ops.sum(columns, axis=-1, keepdims=True),
    )
    # See `_round` of entropic.py: a remainder of rounding is not divided by 0.
    return plan + rows * (columns / ops.maximum(missing, 1e-7))


def _kl(mass, excess):
    """Σ (r log(r/p) − r + p) of r = p (1 + t), with the digits of a small t."""
    t = excess
    terms = (1 + t) * ops.log1p(ops.maximum(t, -1 + 1e-6)) - t
    series = ops.square(t) * (1 / 2 - t / 6 + ops.square(t) / 12)
    return ops.sum(mass * ops.where(ops.abs(t) < 0.03, series, terms), axis=-1)
