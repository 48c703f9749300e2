"""The networks: pictures to features, and latent variables to pictures."""

import keras
from keras import layers, ops

from blogkeras import backend
from blogkeras.nvae.cells import InvertedCell, ResidualCell
from blogkeras.nvae.convolution import Convolution
from blogkeras.nvae.distributions import Normal
from blogkeras.nvae.flows import PairedFlow


class Tower(layers.Layer):
    """The base class of both networks: their cells, and recomputation.

    Args:
        config: `NVAEConfig`.
        recompute: Boolean. Whether what cells compute in a training step is
            computed once more for the gradient, instead of being kept.
    """

    def __init__(self, config, recompute=False, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.recompute = recompute

    def _cell(self, cls, shape, name, **kwargs):
        """A cell, built, and the shape of its output."""
        cell = cls(
            squeeze_excite=self.config.squeeze_excite,
            batch_norm=self.config.batch_norm,
            dtype=self.dtype_policy,
            name=name,
            **kwargs,
        )
        cell.build(shape)
        return cell, cell.compute_output_shape(shape)

    def _convolution(self, shape, name, *args, **kwargs):
        layer = Convolution(*args, dtype=self.dtype_policy, name=name, **kwargs)
        layer.build(shape)
        return layer

    def _run(self, cell, x, training):
        if training and self.recompute:
            return backend.remat(lambda x: cell(x, training=True), [cell], x)
        return cell(x, training=training)


class Encoder(Tower):
    """From a picture to the features that each group's posterior depends on.

    Output: list of tensors, one for each group, in the order of drawing: from
    the coarsest scale to the finest.
    """

    def build(self, input_shape):
        config = self.config
        shape = (None, *config.padded_shape)
        self.stem = self._convolution(shape, "stem", config.channels, 3)
        shape = (*shape[:3], config.channels)
        self.blocks = []
        for block in range(config.num_blocks):
            for i in range(config.cells_per_block):
                cell, shape = self._cell(
                    ResidualCell,
                    shape,
                    f"block_{block}_cell_{i}",
                    down=i == config.cells_per_block - 1,
                )
                self.blocks.append(cell)
        # One list for each group, from the finest scale to the coarsest.
        self.groups = []
        for scale, count in enumerate(config.groups):
            for group in range(count):
                cells = []
                if scale and not group:
                    down, shape = self._cell(
                        ResidualCell, shape, f"down_{scale}", down=True
                    )
                    cells.append(down)
                for i in range(config.cells_per_group):
                    cell, shape = self._cell(
                        ResidualCell, shape, f"scale_{scale}_{group}_cell_{i}"
                    )
                    cells.append(cell)
                self.groups.append(cells)
        self.head = self._convolution(shape, "head", shape[-1], 1)

    def call(self, x, training=None):
        x = self.stem(2 * x - 1)
        for cell in self.blocks:
            x = self._run(cell, x, training)
        features = []
        for cells in self.groups:
            for cell in cells:
                x = self._run(cell, x, training)
            features.append(x)
        features[-1] = ops.elu(self.head(ops.elu(x)))
        return features[::-1]


class Group(Tower):
    """One group of latent variables.

    The cells in front of it, its prior and posterior, and how it is combined
    with the decoder's state.

    Args:
        first: Boolean. The group that is drawn first has no cells and a fixed
            prior.
        up: Boolean. Whether a finer scale follows.
    """

    def __init__(self, config, first=False, up=False, **kwargs):
        super().__init__(config, **kwargs)
        self.first = first
        self.up = up

    def build(self, input_shape):
        config, latent = self.config, self.config.latent_channels
        channels = input_shape[-1]
        self.cells = []
        self.posterior = self._convolution(
            input_shape, "posterior", 2 * latent, 3
        )
        if not self.first:
            for i in range(config.cells_per_group):
                self.cells.append(
                    self._cell(InvertedCell, input_shape, f"cell_{i}")[0]
                )
            self.prior = self._convolution(input_shape, "prior", 2 * latent, 1)
            self.combine_features = self._convolution(
                input_shape, "combine_features", channels, 1
            )
        self.combine_latents = self._convolution(
            (*input_shape[:3], channels + latent),
            "combine_latents",
            channels,
            1,
        )
        self.flows = [
            PairedFlow(dtype=self.dtype_policy, name=f"flow_{i}")
            for i in range(config.num_flows)
        ]
        for flow in self.flows:
            flow.build((*input_shape[:3], latent))
        if self.up:
            self.enlarge, _ = self._cell(
                InvertedCell, input_shape, "enlarge", up=True
            )

    def run_cells(self, h, training):
        """The state after the cells in front of the group."""
        for cell in self.cells:
            h = self._run(cell, h, training)
        return h

    def distributions(self, h, features=None):
        """The prior, and the posterior where features of a picture are given.

        Args:
            h: `(batch, height, width, channels)`, the decoder's state.
            features: The encoder's, of the same shape, or `None`.
        """
        mean, log_scale = 0.0, 0.0
        if not self.first:
            outputs = ops.cast(self.prior(ops.elu(h)), "float32")
            mean, log_scale = ops.split(outputs, 2, axis=-1)
            if features is not None:
                features = features + self.combine_features(h)
        elif features is None:
            mean = ops.zeros(
                (*ops.shape(h)[:3], self.config.latent_channels), "float32"
            )
            log_scale = mean
        if features is None:
            return Normal(mean, log_scale), None
        outputs = ops.cast(self.posterior(features), "float32")
        delta_mean, delta_log_scale = ops.split(outputs, 2, axis=-1)
        if self.first:
            mean = log_scale = ops.zeros_like(delta_mean)
        prior = Normal(mean, log_scale)
        if self.config.residual_posterior:
            # Added before the clamp: μ + Δμ and log σ + log Δσ.
            delta_mean = mean + delta_mean
            delta_log_scale = log_scale + delta_log_scale
        return prior, Normal(delta_mean, delta_log_scale)

    def combine(self, h, z, training):
        """The state with the latent variables.

        Where the group is the last of its scale, at the next scale's size.
        """
        h = self.combine_latents(
            ops.concatenate([h, ops.cast(z, h.dtype)], axis=-1)
        )
        return self._run(self.enlarge, h, training) if self.up else h


class Decoder(Tower):
    """From latent variables, drawn group after group, to a picture."""

    def build(self, input_shape=None):
        config = self.config
        # From the coarsest scale to the finest.
        scales = range(len(config.groups) - 1, -1, -1)
        channels = config.channels * 2 ** (config.num_blocks + scales[0])
        height, width, _ = config.latent_shapes[0]
        shape = (None, height, width, channels)
        self.start = self.add_weight(
            shape[1:], keras.initializers.RandomUniform(0, 1), name="start"
        )
        self.groups = []
        for scale in scales:
            for i in range(config.groups[scale]):
                group = Group(
                    config,
                    first=not self.groups,
                    up=scale > 0 and i == config.groups[scale] - 1,
                    recompute=self.recompute,
                    dtype=self.dtype_policy,
                    name=f"scale_{scale}_{i}",
                )
                group.build(shape)
                self.groups.append(group)
            if scale:
                _, height, width, channels = shape
                shape = (None, 2 * height, 2 * width, channels // 2)
        self.blocks = []
        for block in range(config.num_blocks):
            for i in range(config.cells_per_block):
                cell, shape = self._cell(
                    InvertedCell,
                    shape,
                    f"block_{block}_cell_{i}",
                    expansion=3,
                    up=not i,
                )
                self.blocks.append(cell)
        self.head = self._convolution(shape, "head", config.num_outputs, 3)

    def draw(
        self,
        rows,
        noise,
        features=None,
        given=None,
        temperature=1.0,
        training=None,
    ):
        """Draws the groups and the parameters of the pixels.

        Args:
            rows: Integer or tensor. The number of pictures.
            noise: Function `shape -> tensor`: standard normal noise.
            features: The encoder's output: groups are then drawn from the
                posterior. `None`: from the prior.
            given: List with a tensor for each group that is not drawn, and
                `None` for the others.
            temperature: Number or tensor that multiplies the scales.
            training: Boolean.

        Returns:
            Dict. `parameters`: `(rows, height, width, num_outputs)`, without
            the padding. `z`: list of the groups, float32. With features
            besides: `mean` and `scale` of the posteriors, before flows (lists);
            `log_prior` and `log_posterior` of what was drawn, and `kl`, all
            `(rows, groups)`; with flows `kl` is their difference.
        """
        h = ops.convert_to_tensor(self.start)
        h = ops.broadcast_to(
            ops.cast(h, self.compute_dtype)[None], (rows, *h.shape)
        )
        latents = {name: [] for name in ("z", "mean", "scale")}
        terms = {name: [] for name in ("log_prior", "log_posterior", "kl")}
        for i, group in enumerate(self.groups):
            h = group.run_cells(h, training)
            if given is not None and given[i] is not None:
                z = ops.cast(given[i], "float32")
            else:
                prior, posterior = group.distributions(
                    h, None if features is None else features[i]
                )
                drawn = prior if posterior is None else posterior
                z = drawn.sample(noise(ops.shape(drawn.mean)), temperature)
                if posterior is not None:
                    log_posterior = posterior.log_prob(z)
                    for flow in group.flows:
                        z = flow(z)
                    log_prior = prior.log_prob(z)
                    kl = log_posterior - log_prior
                    if not group.flows:
                        kl = posterior.kl(prior)
                    for name, term in (
                        ("log_prior", log_prior),
                        ("log_posterior", log_posterior),
                        ("kl", kl),
                    ):
                        terms[name].append(ops.sum(term, axis=(1, 2, 3)))
                    latents["mean"].append(posterior.mean)
                    latents["scale"].append(posterior.scale)
            latents["z"].append(z)
            h = group.combine(h, z, training)
        for cell in self.blocks:
            h = self._run(cell, h, training)
        parameters = self.head(ops.elu(h))
        around = self.config.padding
        if around:
            parameters = parameters[:, around:-around, around:-around]
        outputs = {"parameters": ops.cast(parameters, "float32"), **latents}
        if features is not None:
            for name, values in terms.items():
                outputs[name] = ops.stack(values, axis=-1)
        return outputs
