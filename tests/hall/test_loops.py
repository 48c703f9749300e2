"""Compiled loops in chunks, their progress, and caches with an end."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from kit import value

from blogkeras import backend, loops


def recurrence(index, state, factor):
    """xᵢ₊₁ = factor · xᵢ + i, and a count."""
    x, count = state
    return factor * x + ops.cast(index, "float32"), count + 1


def by_hand(x, steps, factor):
    for index in range(steps):
        x = np.float32(factor) * x + np.float32(index)
    return x


START = (ops.convert_to_tensor(1.0), ops.convert_to_tensor(0, "int32"))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_chunks_do_not_change_the_result(chunk_size):
    program = loops.loop_program(recurrence, backend.jit)
    factor = ops.convert_to_tensor(0.5)
    x, count = loops.run_steps(
        program, START, 10, factor, chunk_size=chunk_size
    )
    # Halves of small integers: exact in float32.
    assert float(x) == by_hand(1.0, 10, 0.5)
    assert int(count) == 10
    x, count = loops.run_steps(program, START, 0, factor)
    assert float(x) == 1
    assert int(count) == 0


def test_progress_and_checks(capsys):
    seen = []
    program = loops.loop_program(recurrence, backend.jit)
    arguments = (program, START, 45, ops.convert_to_tensor(0.5))
    loops.run_steps(
        *arguments, verbose=1, check=lambda done, state: seen.append(done)
    )
    assert seen[-1] == 45
    assert len(seen) == 15
    assert "45/45" in capsys.readouterr().out

    def stop(done, state):
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt, match="5"):
        loops.run_steps(*arguments, chunk_size=5, check=stop)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Received: num_steps=2.5"):
        loops.run_steps(program, START, 2.5, ops.ones(()))


def test_a_loop_reads_the_weights_of_the_moment():
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    layer.build((None, 1))
    program = loops.loop_program(
        lambda index, x: layer(x), lambda fn: backend.jit_layer(fn, layer)
    )
    x = ops.ones((1, 1))
    assert float(value(loops.run_steps(program, x, 3))[0, 0]) == 1
    layer.kernel.assign([[2.0]])
    assert float(value(loops.run_steps(program, x, 3))[0, 0]) == 8


def test_the_cache_forgets_what_was_not_used():
    cache, built = loops.ProgramCache(2), []

    def make(key):
        return lambda: built.append(key) or key

    for key in "abacab":
        assert cache.get(key, make(key)) == key
        assert len(cache) <= 2
    assert built == ["a", "b", "c", "b"]
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.size == 2
        assert len(other) == 0
    cache.clear()
    assert len(cache) == 0
