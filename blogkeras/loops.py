"""Long work in compiled pieces, with a progress bar; bounded caches."""

import collections

import keras
from keras import ops

from blogkeras.arguments import check_integer, check_verbose


class ProgramCache:
    """Keeps the compiled programs that were used last.

    A compiled program stays in memory as long as somebody refers to it. A
    service that meets a new shape with each request would fill the memory.

    Args:
        size: Integer. How many programs are kept.

    Example:

    >>> programs = ProgramCache(size=8)
    >>> double = programs.get("double", lambda: backend.jit(lambda x: 2 * x))
    """

    def __init__(self, size=16):
        self.size = check_integer("size", size, minimum=1)
        self._programs = collections.OrderedDict()

    def __len__(self):
        return len(self._programs)

    def get(self, key, make):
        """The program under `key`; `make()` builds it where there is none."""
        if key not in self._programs:
            self._programs[key] = make()
        self._programs.move_to_end(key)
        while len(self._programs) > self.size:
            self._programs.popitem(last=False)
        return self._programs[key]

    def clear(self):
        self._programs.clear()

    # Compiled programs can be neither copied nor pickled, nor need they be.

    def __deepcopy__(self, memo):
        return type(self)(self.size)

    def __reduce__(self):
        return type(self), (self.size,)


def loop_program(step, compile):
    """Compiles `num` steps as one program, for any `num`.

    Args:
        step: Pure function `(index, state, *constants) -> state` of tensors.
            `index` is a scalar int32 tensor; `state` a nested structure whose
            shapes and dtypes do not change.
        compile: `backend.jit`, or `lambda fn: backend.jit_layer(fn, layer)`
            where `step` calls a layer.

    Returns:
        Function `(start, stop, state, *constants) -> state`, to be given to
        `run_steps`.
    """

    def run(start, stop, state, *constants):
        return ops.while_loop(
            lambda index, state: index < stop,
            lambda index, state: (index + 1, step(index, state, *constants)),
            (start, state),
        )[1]

    return compile(run)


def run_steps(
    program,
    state,
    num_steps,
    *constants,
    chunk_size=None,
    verbose=0,
    check=None,
):
    """Runs a compiled loop, in chunks where progress is shown or checked.

    All chunks run the same program, so their size does not change a bit of the
    result.

    Args:
        program: What `loop_program` returned.
        state: Nested structure of tensors.
        num_steps: Integer ≥ 0.
        *constants: Tensors that each step is given besides.
        chunk_size: Integer. Steps between two looks. Defaults to a twentieth
            of all with a progress bar or a `check`, else to all.
        verbose: `"auto"`, 0, 1 or 2, as in Keras's `fit`.
        check: Function `(steps_done, state)` called after each chunk; it may
            raise to end the loop.

    Returns:
        The state after the last step.
    """
    num_steps = check_integer("num_steps", num_steps, minimum=0)
    verbose = check_verbose(verbose)
    if chunk_size is None:
        in_parts = verbose == 1 or check is not None
        chunk_size = -(-num_steps // 20) if in_parts else num_steps
    chunk_size = max(check_integer("chunk_size", chunk_size, minimum=0), 1)
    bar = None
    if verbose and num_steps:
        bar = keras.utils.Progbar(num_steps, verbose=verbose, unit_name="step")
    done = 0
    while done < num_steps:
        stop = min(done + chunk_size, num_steps)
        state = program(
            ops.convert_to_tensor(done, "int32"),
            ops.convert_to_tensor(stop, "int32"),
            state,
            *constants,
        )
        done = stop
        if check is not None:
            check(done, state)
        if bar is not None:
            bar.update(done)
    return state
