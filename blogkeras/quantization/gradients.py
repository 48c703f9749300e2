"""The gradient of a quantized vector, which has none of its own."""

import functools

from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_choice, check_integer, check_number
from blogkeras.ops import normalize, safe_norm, straight_through
from blogkeras.state import draw_rows

GRADIENTS = ("straight-through", "rotation", "diveq", "diveq-detach")
# ‖z‖ / ‖q‖ below which z is 0 up to the rounding of q.
_NOTHING = 2.0**-24


def rotated(quantized, z):
    """The value of `quantized`, with the gradient of a rotation of z.

        output = sg[(‖q‖ / ‖z‖) R] z,  R = I + 2 q̃ z̃ᵀ - 2 w wᵀ,
        z̃ = z / ‖z‖,  q̃ = q / ‖q‖,  w = (z̃ + q̃) / ‖z̃ + q̃‖

    R turns z̃ into q̃ and leaves alone what is orthogonal to both. It is never
    formed: R z has two scalar products. For q̃ = -z̃ there is no w; then R is
    the reflection I - 2 z̃ z̃ᵀ, which maps z̃ to q̃ as well. Where z is 0, or
    shorter than 2⁻²⁴ ‖q‖, it has no direction: the gradient is the identity.
    Where q is 0 there is no gradient.

    Args:
        quantized: `(..., dim)`, float32, q.
        z: `(..., dim)`, float32.

    Returns:
        `(..., dim)`, equal to `quantized` to the bit.
    """
    quantized, fixed = map(ops.stop_gradient, (quantized, z))
    size_q, norm_q = _length(quantized)
    size_z, norm_z = _length(fixed)
    has_direction = size_z * norm_z > _NOTHING * size_q * norm_q
    scale = size_q / ops.where(has_direction, size_z, 1)
    scale = scale * norm_q / ops.where(has_direction, norm_z, 1)
    q, z0 = normalize(quantized), normalize(fixed)
    w = normalize(q + z0)

    def product(x, y):
        return ops.sum(x * y, axis=-1, keepdims=True)

    turned = z + 2 * q * product(z0, z) - 2 * w * product(w, z)
    backward = ops.where(has_direction, scale * turned, z)
    return straight_through(quantized, backward)


def directed(quantized, z, noise=None):
    """DiVeQ: the distance from z to the code has a gradient.

        output = z + ‖q - z‖ sg[(q - z + ε) / ‖q - z + ε‖]

    Its gradient reaches z and the code, so no other loss is needed. Without
    noise ε this is DiVeQ-detach, whose value is q. Where q = z, the gradient is
    the identity for z and 0 for q.

    Args:
        quantized: `(..., dim)`, float32, q.
        z: `(..., dim)`, float32.
        noise: `(..., dim)`, ε, or `None`.

    Returns:
        `(..., dim)`; without noise equal to `quantized` to the bit.
    """
    error = quantized - z
    size, norm = _length(error)
    length = size * norm
    if noise is not None:
        return z + length * ops.stop_gradient(normalize(error + noise))
    output = z + length * ops.stop_gradient(normalize(error))
    return straight_through(quantized, output)


def _length(x):
    """Two factors of ‖x‖, of which the first has no gradient.

    They are the largest entry and the norm relative to it: the square of a
    large or a small number would leave the range of float32.
    """
    # `initial` is for empty batches, of which TensorFlow takes no maximum.
    size = ops.max(ops.abs(x), axis=-1, keepdims=True, initial=0)
    size = ops.stop_gradient(size)
    unit = x / ops.where(size > 0, size, 1)
    return size, safe_norm(unit, axis=-1, keepdims=True)


class EstimatedGradient:
    """What quantizers with a codebook share: the gradient and the losses."""

    def _choose_gradient(
        self, gradient, noise_variance, seed, codebook_cost, commitment_cost
    ):
        """Sets the attributes of these arguments; `None` is a default cost."""
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        self.noise_variance = check_number(
            "noise_variance", noise_variance, minimum=0
        )
        self.seed = None if seed is None else check_integer("seed", seed)
        if gradient == "diveq":
            self._number_draws(self.seed)
        self.codebook_cost, self.commitment_cost = (
            # The DiVeQ gradients bring codes and vectors together themselves.
            default * (not gradient.startswith("diveq"))
            if cost is None
            else check_number(name, cost, minimum=0)
            for name, cost, default in (
                ("codebook_cost", codebook_cost, 1.0),
                ("commitment_cost", commitment_cost, 0.25),
            )
        )

    def estimate_gradient(self, quantized, z):
        """The output: the value of `quantized`, with the chosen gradient."""
        if self.gradient == "straight-through":
            return straight_through(quantized, z)
        if self.gradient == "rotation":
            return rotated(quantized, z)
        return directed(quantized, z)

    def _estimated(self, quantized, z, seed):
        """As `estimate_gradient`, in training with the noise of DiVeQ.

        Args:
            quantized, z: As for `estimate_gradient`.
            seed: As `_next_seed` gives it.
        """
        if seed is None or self.gradient != "diveq":
            return self.estimate_gradient(quantized, z)
        normal = functools.partial(
            backend.normal,
            stddev=self.noise_variance**0.5,
            dtype="float32",
        )
        return directed(quantized, z, draw_rows(normal, ops.shape(z), seed))

    def _gradient_config(self):
        return {
            "codebook_cost": self.codebook_cost,
            "commitment_cost": self.commitment_cost,
            "gradient": self.gradient,
            "noise_variance": self.noise_variance,
            "seed": self.seed,
        }
