"""ops.sample_categorical: the inverse distribution function, frequencies."""

import numpy as np
import pytest
from keras import ops
from kit import value
from scipy import stats

from blogkeras import backend
from blogkeras.ops import sample_categorical

RNG = np.random.default_rng(0)


def sample(logits, u, **options):
    program = backend.jit(lambda x, y: sample_categorical(x, y, **options))
    return value(
        program(ops.convert_to_tensor(logits), ops.convert_to_tensor(u))
    )


def inverse(logits, u):
    """The distribution function inverted in float64."""
    p = np.exp(logits - logits.max(-1, keepdims=True), dtype="float64")
    below = p.cumsum(-1) / p.sum(-1, keepdims=True)
    return (below <= u[..., None]).sum(-1)


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_it_inverts_the_distribution_function(block_size):
    logits = RNG.normal(scale=3, size=(40, 5, 300)).astype("float32")
    u = RNG.random((40, 5), "float32")
    drawn = sample(logits, u, block_size=block_size)
    assert drawn.dtype == "int32"
    # At a border float32 may fall on either side.
    assert (drawn != inverse(logits, u)).mean() <= 0.01
    assert np.abs(drawn - inverse(logits, u)).max() <= 1


def test_classes_of_no_probability_are_never_drawn():
    logits = np.full((3, 300), -np.inf, "float32")
    logits[:, [5, 130, 289]] = [0.0, -3.0, -50.0]
    u = np.array([0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))])
    np.testing.assert_array_equal(
        sample(logits, u.astype("float32")), [5, 5, 130]
    )
    # All probability in one class, wherever u is.
    logits[:, 5] = -np.inf
    logits[:, 130] = -np.inf
    np.testing.assert_array_equal(
        sample(logits, u.astype("float32")), [289] * 3
    )


def test_frequencies():
    p = RNG.dirichlet(np.full(200, 0.5))
    logits = np.log(p).astype("float32")
    drawn = sample(logits, RNG.random((200, 500), "float32"))
    assert drawn.shape == (200, 500)
    count = np.bincount(drawn.ravel(), minlength=200)
    often = p * drawn.size >= 5
    expected = p[often] / p[often].sum() * count[often].sum()
    assert stats.chisquare(count[often], expected).pvalue > 1e-3


def test_no_gradient_passes():
    def loss(logits):
        drawn = sample_categorical(logits, ops.full((2,), 0.5))
        return ops.sum(logits[:, 0]) + ops.cast(ops.sum(drawn), "float32"), ()

    logits = ops.convert_to_tensor(RNG.normal(size=(2, 4)).astype("float32"))
    _, gradient = backend.value_and_grad(loss, logits)
    expected = np.zeros((2, 4))
    expected[:, 0] = 1
    np.testing.assert_array_equal(value(gradient), expected)


def test_large_and_half_precision_logits():
    logits = np.array([[3e4, 3e4 - 1, -3e4]], "float32")
    assert sample(logits, np.zeros(1, "float32"))[0] == 0
    assert sample(logits, np.full(1, 0.9, "float32"))[0] == 1
    half = ops.cast(ops.convert_to_tensor(logits / 1e4), "bfloat16")
    drawn = sample_categorical(half, ops.zeros((1,)))
    assert value(drawn)[0] == 0
