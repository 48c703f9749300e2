"""NVAE: a variational autoencoder with many groups of latent variables."""

import inspect
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    check_sizes,
    row_weights,
)
from blogkeras.loops import ProgramCache
from blogkeras.models import TargetlessModel, check_own_loss
from blogkeras.nvae import objective, verbs
from blogkeras.nvae.checks import (
    check_batch,
    check_data,
    check_latents,
    check_pixels,
    check_shape,
    warn_if_not_annealed,
)
from blogkeras.nvae.convolution import (
    Convolution,
    SpectralPenalty,
    spectral_norm,
)
from blogkeras.nvae.distributions import (
    noise,
    picture_numbers,
    picture_sum,
    pixels,
)
from blogkeras.nvae.likelihood import evaluate_likelihood
from blogkeras.nvae.networks import Decoder, Encoder
from blogkeras.nvae.presets import PRESETS, NVAEConfig
from blogkeras.nvae.statistics import recalibrate
from blogkeras.state import NumberedDraws, draw_rows


@keras.saving.register_keras_serializable(package="blogkeras")
class NVAE(TargetlessModel):
    """A deep hierarchical variational autoencoder for pictures.

    Latent variables come in groups z_1 … z_L, drawn one after another at
    growing sizes. Prior and posterior of a group are normal distributions whose
    parameters depend on the groups before:

        p(z_l | z_<l) = N(μ, σ²),  q(z_l | z_<l, x) = N(μ + Δμ, σ² Δσ²)
        KL = ½ Σ (Δμ²/σ² + Δσ² − log Δσ² − 1)
        loss = −log p(x | z) + β Σ_l γ_l KL_l + λ (Σ σ_max + Σ max |γ_BN|)

    with the largest singular value σ_max of each convolution and the scales
    γ_BN of each batch normalization. β, γ_l and λ: see `NVAEConfig`.

    `fit(x)` with pictures as floats in [0, 1], `(n, height, width, channels)`;
    `y` is accepted and not used. Metrics, in nats for each picture: `nelbo` and
    its parts `reconstruction` and `kl`. `loss` also contains the weights and
    penalties of training. `model(x)` gives a dict: the mean picture
    `reconstruction`, `log_likelihood` `(n,)` and `kl` `(n, groups)`. Sample
    weights are one for each picture. Convolutions and cells follow the dtype
    policy; distributions, KL terms and penalties are of float32.

    Latent variables are drawn anew at each training step, numbered by a saved
    count: a model that is saved, loaded and trained further continues as if it
    had not been interrupted. In `evaluate` and `predict` they depend on `seed`
    and on the pictures of a batch alone: other batches draw other ones, and the
    same batches the same ones at each call.

    Args:
        config: `NVAEConfig`, or a dict of its fields.
        recompute: Boolean. Whether cells are computed again for the gradient,
            which takes less memory and more time.
        seed: Integer or `None`.
        **kwargs: Of `keras.Model`: `name`, `dtype`.

    Raises:
        ValueError: if `config` is no `NVAEConfig`; and in the verbs, on
            pictures of another shape or with pixels that the likelihood does
            not know, and on temperatures below 0.

    Example:

    >>> model = NVAE.from_preset("digits", kl_warmup_steps=500)
    >>> model.compile(keras.optimizers.Adamax(5e-3))
    >>> images = np.random.rand(32, 8, 8, 1)
    >>> history = model.fit(images, verbose=0)  # take 20 epochs of real ones
    >>> model.sample(16, temperature=0.8).shape
    (16, 8, 8, 1)

    Departs from the post: flows, which it advises to leave out, are part of
    the presets that were published with them. From the published code: the
    temperature of discretized logistics multiplies their scales (there it
    divides them); batch statistics are recalibrated to the exact average; the
    power iteration has no longer first step; biases start at zero.

    Reference:
        [Vahdat & Kautz, 2020](https://arxiv.org/abs/2007.03898);
        [blog post 7574](https://kexue.fm/archives/7574)
    """

    ROW = "picture"

    def __init__(
        self,
        config: Any,
        recompute: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Pictures keep their 8 bits under a policy of half precision.
        super().__init__(autocast=False, **kwargs)
        if isinstance(config, dict):
            config = _config_of(config)
        if not isinstance(config, NVAEConfig):
            raise ValueError(
                "Expected an NVAEConfig, or a dict of its fields; for a name "
                f"take NVAE.from_preset. Received: config={config!r}"
            )
        if self.variable_dtype != "float32":
            raise ValueError(
                "Expected a policy whose variables are float32: 'float32', "
                "'mixed_bfloat16' or 'mixed_float16'. Received: "
                f"{self.dtype_policy.name!r}"
            )
        self.config = config
        self.recompute = check_boolean("recompute", recompute)
        self.seed = check_seed("seed", seed)
        self.encoder, self.decoder = (
            cls(config, recompute, dtype=self.dtype_policy, name=name)
            for cls, name in ((Encoder, "encoder"), (Decoder, "decoder"))
        )
        self.nelbo, self.reconstruction, self.kl = (
            keras.metrics.Mean(name=name)
            for name in ("nelbo", "reconstruction", "kl")
        )
        self._row_loss = objective.RowLoss(name="rows")
        self._programs = ProgramCache(size=16)

    @classmethod
    def from_preset(
        cls,
        name,
        input_shape=None,
        recompute=False,
        seed=None,
        dtype=None,
        **changes,
    ):
        """A published architecture, untrained.

        `"mnist"`, `"cifar10"`, `"celeba_64"`, `"imagenet_32"`,
        `"celeba_hq_256"`, `"ffhq_256"`; for a CPU `"mnist_small"` and
        `"digits"`.

        Args:
            name: String.
            input_shape: `(height, width, channels)`. Where height or width are
                not the preset's, nothing is padded unless you say so. Defaults
                to the preset's.
            recompute, seed, dtype: As for `NVAE`.
            **changes: Fields of `NVAEConfig`; those that depend on the number
                of steps, such as `kl_warmup_steps`, are in no preset.
                `imagenet_32`, `celeba_hq_256` and `ffhq_256` have a
                `spectral_start`, which needs them.
        """
        check_choice("name", name, tuple(PRESETS))
        fields = PRESETS[name].to_dict()
        if input_shape is not None:
            input_shape = check_sizes("input_shape", input_shape, length=3)
            if input_shape[:2] != tuple(fields["input_shape"][:2]):
                fields["padding"] = 0
            fields["input_shape"] = input_shape
        config = _config_of({**fields, **changes})
        return cls(config, recompute, seed, dtype=dtype)

    @as_in_keras
    def compile(self, optimizer="adamax", loss=None, **kwargs):
        check_own_loss({"loss": loss, **kwargs})
        warn_if_not_annealed(self.config)
        super().compile(optimizer, **kwargs)
        self._programs.clear()
        # All shapes are known here. If the optimizer made its variables in the
        # first step, TensorFlow would trace that step twice.
        self.build()
        self.optimizer.build(self.trainable_variables)

    def build(self, input_shape=None):
        if self.built:
            return
        if input_shape is not None:
            check_shape(input_shape, self.config)
        self.encoder.build((None, *self.config.padded_shape))
        self.decoder.build()
        self.draws = NumberedDraws(self, self.seed)
        self.convolutions = [
            layer
            for layer in self._flatten_layers()
            if isinstance(layer, Convolution)
        ]
        self.norms = [
            layer
            for layer in self._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        self.penalty = None
        if self.config.spectral_weight:
            self.penalty = SpectralPenalty(self, self.convolutions)
        # What was frozen before its layers were made.
        for part in (self.encoder, self.decoder, self):
            if not part.trainable:
                for layer in part._flatten_layers(include_self=False):
                    layer.trainable = False

    def _symbolic_inputs(self):
        self.build()
        return keras.KerasTensor((None, *self.config.input_shape), "float32")

    # The loss

    def call(self, inputs, training=None):
        if isinstance(inputs, (dict, list, tuple)):
            raise ValueError(
                "Expected pictures as one tensor. Received: "
                f"{type(inputs).__name__}"
            )
        check_shape(inputs.shape, self.config)
        inputs = backend.with_shape(inputs, (None, *self.config.input_shape))
        if training:
            seed = self.draws.next_step()
        else:
            seed = self.draws.evaluation(picture_numbers(inputs))
        x = self._prepare(inputs, seed)
        outputs = self.decoder.draw(
            ops.shape(x)[0],
            noise(seed, rows=True),
            features=self._encode(x, training),
            training=training,
        )
        distribution = pixels(self.config, outputs["parameters"])
        return {
            "reconstruction": distribution.mean(),
            "log_likelihood": picture_sum(distribution.log_prob(x)),
            "kl": outputs["kl"],
        }

    def _prepare(self, x, seed=None):
        """The picture that the likelihood is of, float32.

        Args:
            x: `(batch, height, width, channels)`.
            seed: Seed of binary pictures, where they are drawn from grey
                values. `None`: they were drawn before, see `verbs.pictures`.
        """
        config = self.config
        x = ops.cast(x, "float32")
        if config.binarize == "dynamic" and seed is not None:
            u = draw_rows(backend.uniform, ops.shape(x), seed)
            return ops.cast(u < x, "float32")
        if config.likelihood == "logistic_mixture":
            steps = ops.round(x * 255)
            steps = ops.floor(steps / 2 ** (8 - config.num_bits))
            return steps / (2**config.num_bits - 1)
        return x

    def _encode(self, x, training=False):
        around = [self.config.padding] * 2
        if self.config.padding:
            x = ops.pad(x, [[0, 0], around, around, [0, 0]])
        return self.encoder(x, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        config = self.config
        kl, reconstruction = y_pred["kl"], -y_pred["log_likelihood"]
        if sample_weight is not None:
            sample_weight = row_weights(sample_weight, self.ROW)
        total = ops.sum(kl, axis=-1)
        for metric, values in (
            (self.nelbo, reconstruction + total),
            (self.reconstruction, reconstruction),
            (self.kl, total),
        ):
            metric.update_state(values, sample_weight)
        if not training:
            values = reconstruction + total
            return self._row_loss(values, values, sample_weight)
        # This step has already been counted.
        step = ops.convert_to_tensor(self.draws.iterations.value) - 1
        beta = objective.kl_weight(config, step)
        gamma = objective.balance(config, kl, beta)
        values = reconstruction + beta * ops.sum(gamma * kl, axis=-1)
        loss = self._row_loss(values, values, sample_weight)
        if self.penalty is None:
            return loss
        scales = [
            ops.max(ops.abs(ops.cast(norm.gamma, "float32")))
            for norm in self.norms
        ]
        penalty = self.penalty() + sum(scales)
        penalty *= objective.spectral_weight(config, beta)
        # The same reduction as for rows, since the losses of replicas are
        # added.
        penalty = ops.reshape(penalty, (1,))
        return loss + self._row_loss(penalty, penalty)

    # The values of pixels are checked here, before they enter a compiled step.

    def _check_data(self, x):
        if inspect.isgenerator(x):
            return self._checked_batches(x), None
        x = check_data(x, self.config)
        return x, len(x) if isinstance(x, np.ndarray) else None

    def _check_batch(self, batch):
        check_batch(batch, self.config)

    # Verbs

    def sample(
        self,
        num,
        temperature=1.0,
        output=None,
        seed=None,
        batch_size=32,
        verbose=0,
    ):
        """New pictures.

        Args:
            num: Integer.
            temperature: Number ≥ 0 that multiplies the scales of all latent
                variables, and sharpens the pixels' distribution; 0 is the mode.
            output: `"mean"` of the pixels, or a `"sample"` of them. Defaults
                to the mean for binary pixels, else to the sample.
            seed: Integer, `None` or a `keras.random.SeedGenerator`. What is
                drawn depends on it and on `batch_size`.
            batch_size: Integer. Pictures computed at once.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(num, height, width, channels)` in [0, 1], float32.
        """
        num = check_integer("num", num, minimum=1)
        none = [None] * len(self.config.latent_shapes)
        return verbs.draw(
            self, none, num, temperature, output, seed, batch_size, verbose
        )

    def decode(
        self,
        z,
        num=None,
        temperature=1.0,
        output=None,
        seed=None,
        batch_size=32,
        verbose=0,
    ):
        """Pictures with some groups given; the others are drawn.

        The first groups determine the large structures, the last ones details.

        Args:
            z: List of arrays `(n, height, width, latent_channels)`, one for
                each group as `encode` gives them, with `None` for groups to be
                drawn from the prior. A shorter list gives the first groups.
            num: Integer. How many pictures, where no group is given.
            temperature, output, seed, batch_size, verbose: As for `sample`.

        Returns:
            NumPy array `(n, height, width, channels)`.
        """
        z, num = check_latents(z, num, self.config)
        return verbs.draw(
            self, z, num, temperature, output, seed, batch_size, verbose
        )

    def encode(self, x, temperature=0.0, seed=None, batch_size=32, verbose=0):
        """Posteriors of pictures.

        The posterior of a group depends on what was drawn for the groups
        before.

        Args:
            x: `(n, height, width, channels)`, or a data set of batches, which
                is read into memory.
            temperature: Number ≥ 0 that multiplies the posteriors' scales. 0:
                each group takes its mean.
            seed, batch_size, verbose: As for `sample`. With
                `binarize="dynamic"` binary pictures are drawn, too, as in
                `evaluate_likelihood`.

        Returns:
            Dict of three lists of NumPy arrays, one for each group: `z` as
            drawn, after the flows; `mean` and `scale` of the posterior, before
            them.
        """
        return verbs.posterior(
            self,
            x,
            lambda outputs, seed: {
                name: outputs[name] for name in ("z", "mean", "scale")
            },
            "encode",
            temperature,
            seed,
            batch_size,
            verbose,
        )

    def reconstruct(
        self,
        x,
        temperature=1.0,
        output="mean",
        seed=None,
        batch_size=32,
        verbose=0,
    ):
        """Decodes latent variables drawn from the posteriors of pictures.

        Args:
            x: `(n, height, width, channels)`, or a data set of batches, which
                is read into memory.
            temperature: Number ≥ 0 that multiplies the posteriors' scales.
            output: `"mean"` or `"sample"` of the pixels.
            seed, batch_size, verbose: As for `encode`.

        Returns:
            NumPy array `(n, height, width, channels)`.
        """
        output = verbs.what_is_shown(self.config, output)

        def finish(outputs, seed):
            return verbs.observe(self.config, outputs, output, seed, 1.0)

        return verbs.posterior(
            self,
            x,
            finish,
            ("reconstruct", output),
            temperature,
            seed,
            batch_size,
            verbose,
        )

    def interpolate(
        self, x1, x2, num=8, temperature=0.0, seed=None, batch_size=32
    ):
        """Interpolates between pairs of pictures: mixes all groups linearly.

            decode((1 − α) z(x1) + α z(x2))

        Args:
            x1: `(n, height, width, channels)`.
            x2: Shaped like `x1`.
            num: Integer ≥ 2. α runs from 0 to 1 in so many equal steps.
            temperature, seed, batch_size: As for `encode`.

        Returns:
            NumPy array `(n, num, height, width, channels)`.
        """
        num = check_integer("num", num, minimum=2)
        if np.shape(x1) != np.shape(x2):
            raise ValueError(
                "Expected pictures of one shape on both sides. Received: "
                f"{np.shape(x1)} and {np.shape(x2)}"
            )
        z1, z2 = (
            self.encode(x, temperature, seed, batch_size)["z"] for x in (x1, x2)
        )
        alpha = np.linspace(0, 1, num, dtype="float32")
        alpha = alpha[:, None, None, None]
        mixed = [
            ((1 - alpha) * a[:, None] + alpha * b[:, None]).reshape(
                -1, *a.shape[1:]
            )
            for a, b in zip(z1, z2, strict=True)
        ]
        x = self.decode(mixed, output="mean", batch_size=batch_size)
        return x.reshape(-1, num, *x.shape[1:])

    def evaluate_likelihood(
        self,
        x,
        num_samples=10,
        per_image=False,
        seed=0,
        batch_size=32,
        verbose=0,
    ):
        """Lower bounds of log p(x) in nats, and as bits per dimension.

            ELBO = E log w,   IWAE-k = E log (1/k) Σ w_i,
            w = p(x, z) / q(z | x)

        With `binarize="dynamic"` each picture is binarized once, whatever the
        batch: `np.random.default_rng(seed).random(x.shape) < x`. With
        `likelihood="normal"` p is a density.

        Args:
            x: `(n, height, width, channels)`, or a data set of batches, which
                is read into memory.
            num_samples: Integer k.
            per_image: Boolean. Arrays `(n,)` in place of means.
            seed, batch_size, verbose: As for `sample`.

        Returns:
            Dict: `elbo`, `iwae` (nats), `elbo_bits_per_dim`,
            `iwae_bits_per_dim`, and `kl`, in nats for each group.
        """
        k = check_integer("num_samples", num_samples, minimum=1)
        check_boolean("per_image", per_image)
        x = check_pixels(x, self.config)
        return evaluate_likelihood(
            self, x, k, per_image, seed, batch_size, verbose
        )

    def recalibrate_batch_norm(
        self,
        num_batches=100,
        temperature=1.0,
        batch_size=32,
        seed=None,
        verbose=0,
    ):
        """Sets the decoder's batch statistics to those of its own samples.

        Moving averages are those of the training data at a temperature of 1.
        Here the decoder samples batches as in training, and the means and
        variances over all of them replace the averages. Batches with numbers
        that are not finite are left out.

        This is for `sample`. What decodes posteriors (`evaluate`, `predict`,
        `encode`, `reconstruct`, `interpolate`, `evaluate_likelihood`) changes
        with it, so measure first, or keep `get_weights()` of `norms` and set
        them again.

        Args:
            num_batches: Integer.
            temperature: Number ≥ 0, as `sample` will be given.
            batch_size: Integer.
            seed, verbose: As for `sample`.
        """
        num_batches = check_integer("num_batches", num_batches, minimum=1)
        temperature = check_number("temperature", temperature, minimum=0)
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        recalibrate(self, num_batches, temperature, batch_size, seed, verbose)

    def spectral_norms(self):
        """`{path of a convolution: its largest singular value}`.

        Exact ones, of the present kernels as matrices; NaN where a kernel is
        not finite. The penalty of training follows them by power iterations.
        """
        self.build()
        return {layer.path: spectral_norm(layer) for layer in self.convolutions}

    def get_config(self):
        seed = self.seed if isinstance(self.seed, int) else None
        return {
            **super().get_config(),
            "config": self.config.to_dict(),
            "recompute": self.recompute,
            "seed": seed,
        }


def _config_of(fields):
    known = set(NVAEConfig.__dataclass_fields__)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"Expected fields of NVAEConfig: {', '.join(sorted(known))}. "
            f"Received: {unknown}"
        )
    return NVAEConfig(**fields)
