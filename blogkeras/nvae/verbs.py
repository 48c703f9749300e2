"""How a model draws pictures and looks at them: compiled, in batches."""

import numpy as np
from keras import ops

from blogkeras import backend, models
from blogkeras.arguments import check_choice, check_number
from blogkeras.nvae.checks import check_pixels
from blogkeras.nvae.distributions import noise, pixels
from blogkeras.state import StepSeed, base_seed


def compiled(model, fn):
    """`fn` as the model's own steps are run, by what `compile` was given."""
    # XLA's depthwise convolutions are far slower on a CPU; JAX has nothing
    # else.
    xla = backend.BACKEND == "jax" or backend.has_accelerator()
    return models.compiled(model, fn, xla)


def run(model, key, fn, arrays, constants, seed, batch_size, verbose):
    """`fn(*arrays, index, *constants, seed)` of all rows.

    Args:
        model: `NVAE`.
        key: What the compiled program is kept under.
        fn: Function of tensors. `index` holds the numbers of the rows; the
            first one numbers a batch's draws.
        arrays: List of arrays with equally many rows.
        constants: Numbers.
        seed, batch_size, verbose: As the verbs have them.

    Returns:
        The structure of NumPy arrays that `fn` returns, for all rows.
    """
    if not model.built:
        model.build()
    program = model._programs.get(key, lambda: compiled(model, fn))
    constants = [
        *(ops.convert_to_tensor(x, "float32") for x in constants),
        base_seed(seed),
    ]
    rows = len(arrays[-1])
    return models.map_batches(
        lambda *arrays: program(*arrays, *constants),
        [*arrays, np.arange(rows, dtype="int32")],
        batch_size,
        verbose,
    )


def draw(model, z, num, temperature, output, seed, batch_size, verbose):
    """Pictures with the groups of the list `z`.

    Groups that are `None` are drawn from the prior.
    """
    temperature = check_number("temperature", temperature, minimum=0)
    output = what_is_shown(model.config, output)
    given = tuple(x is not None for x in z)
    arrays = [x for x in z if x is not None]

    def program(*args):
        *arrays, index, temperature, seed = args
        arrays = iter(arrays)
        seed = StepSeed(seed, index[0])
        outputs = model.decoder.draw(
            index.shape[0],
            noise(seed),
            given=[next(arrays) if known else None for known in given],
            temperature=temperature,
            training=False,
        )
        return observe(model.config, outputs, output, seed, temperature)

    if not arrays:
        # Rows have to be counted by something.
        arrays = [np.zeros(num, "float32")]
    return run(
        model,
        ("draw", given, output),
        program,
        arrays,
        (temperature,),
        seed,
        batch_size,
        verbose,
    )


def posterior(model, x, finish, key, temperature, seed, batch_size, verbose=0):
    """`finish(outputs, seed)` of what the decoder draws for pictures."""
    temperature = check_number("temperature", temperature, minimum=0)
    x, seed = pictures(check_pixels(x, model.config), model.config, seed)

    def program(x, index, temperature, seed):
        seed = StepSeed(seed, index[0])
        outputs = model.decoder.draw(
            x.shape[0],
            noise(seed),
            features=model._encode(model._prepare(x)),
            temperature=temperature,
            training=False,
        )
        return finish(outputs, seed)

    return run(
        model, key, program, [x], (temperature,), seed, batch_size, verbose
    )


def pictures(x, config, seed):
    """Pictures, binary where the model binarizes, and the seed as an integer.

    All rows are drawn from one stream of numbers before there are batches, so
    that a binary picture does not depend on their size.
    """
    seed = int(ops.convert_to_numpy(base_seed(seed)))
    if config.binarize == "dynamic":
        x = (np.random.default_rng(seed).random(x.shape) < x).astype("float32")
    return x, seed


def what_is_shown(config, output):
    """`"mean"` or `"sample"` of the pixels."""
    if output is None:
        return "mean" if config.likelihood == "bernoulli" else "sample"
    return check_choice("output", output, ("mean", "sample"))


def observe(config, outputs, output, seed, temperature):
    """Pictures from the decoder's outputs."""
    distribution = pixels(config, outputs["parameters"])
    if output == "mean":
        return distribution.mean()
    return distribution.sample(seed, temperature)
