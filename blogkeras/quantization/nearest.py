"""The nearest code of each vector, block by block."""

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.ops import map_blocks

# A block of distances is at most this many numbers: it stays in the cache.
BLOCK = 2**20
GROUP = 64  # codes that are compared with each other in the end


def nearest_codes(z, codebook):
    """The index of the nearest row of `codebook`, for each vector.

        k = argmin_j ||z - e_j||²

    Ties go to the lowest index. Distances are computed block by block: the
    whole matrix of distances is never in memory. (Exported by JAX with a free
    batch size, it is.) On JAX they are float32 on every accelerator; TensorFlow
    may round to TF32, which only a switch for the whole program prevents:
    `tf.config.experimental.enable_tensor_float_32_execution(False)`.

    Args:
        z: `(..., dim)`, float32.
        codebook: `(num_codes, dim)`, float32.

    Returns:
        `(...)`, int32.
    """
    if len(z.shape) != 2:
        shape = ops.shape(z)[:-1]
        flat = ops.reshape(z, [-1, z.shape[-1]])
        return ops.reshape(nearest_codes(flat, codebook), shape)
    if z.shape[0] == 0:  # Keras refuses the maximum of nothing
        return ops.zeros((0,), "int32")
    z, codebook = ops.stop_gradient(z), ops.stop_gradient(codebook)
    center = ops.mean(codebook, axis=0)
    num_codes = codebook.shape[0]
    # ||z - e||² = ||z||² - 2 (z·e - ||e||²/2), around the codebook's mean for
    # the sake of digits.
    e = codebook - center
    half = ops.sum(ops.square(e), axis=1) / 2
    size = min(GROUP, num_codes)
    groups = -(-num_codes // size)
    missing = groups * size - num_codes
    e = ops.transpose(ops.pad(e, [[0, missing], [0, 0]]))
    half = ops.pad(half, [[0, missing]], constant_values=np.inf)
    half = ops.reshape(half, [groups, size])

    def assign(rows):
        # The group with the best code, then the best code of the group. All
        # that looks at every score is a maximum, which XLA does on the way.
        with backend.full_precision():
            score = ops.matmul(rows - center, e)
        best = ops.max(ops.reshape(score, [-1, groups, size]) - half, axis=-1)
        group = _first_largest(best)
        score = ops.reshape(score, [-1, size])
        at = ops.arange(ops.shape(rows)[0], dtype="int32") * groups + group
        score = ops.take(score, at, axis=0) - ops.take(half, group, axis=0)
        return ops.minimum(group * size + _first_largest(score), num_codes - 1)

    return map_blocks(assign, z, max(BLOCK // num_codes, 8))


def _first_largest(score):
    """As `argmax` of the last axis, which XLA is much slower at."""
    size = score.shape[-1]
    best = ops.max(score, axis=-1, keepdims=True)
    found = ops.where(score >= best, ops.arange(size, dtype="int32"), size - 1)
    return ops.min(found, axis=-1)
