"""Several places of a model, perturbed at once."""

import threading

from blogkeras.adversarial.sites import Site


class SeveralSites(Site):
    """Several sites: each has a perturbation of its own.

    The values are those of all sites, one after the other.

    Args:
        sites: List of `Site`.
        joint_norm: Boolean. One norm over all of them, or one for each.
    """

    def __init__(self, sites, joint_norm=False):
        self.sites = sites
        self.joint_norm = joint_norm
        self._step = threading.local()  # a thread for each replica
        self._check_distinct()

    @property
    def batched(self):
        return all(site.batched for site in self.sites)

    @property
    def is_input(self):
        return all(site.is_input for site in self.sites)

    def origin(self, objective, weights):
        origins = [site.origin(objective, weights) for site in self.sites]
        self._check_distinct()  # some are found in the first step
        self._step.sizes = [len(origin) for origin in origins]
        return [x for origin in origins for x in origin]

    def at(self, objective, weights, point, data=None):
        values, perturb = [], {}
        for site, part in self._pairs(point):
            weights, kwargs = site.at(objective, weights, part, data)
            values += kwargs.get("values", ())
            perturb |= kwargs.get("perturb", {})
            data = kwargs.get("data", data)
        kwargs = {"values": values, "perturb": perturb, "data": data}
        return weights, kwargs

    def mask(self, tensors):
        return [
            x for site, part in self._pairs(tensors) for x in site.mask(part)
        ]

    def padding(self, shape):
        # Of words and of positions, the positions alone have no padding.
        return {
            key: mask
            for site in self.sites
            for key, mask in site.padding(shape).items()
            if key is not None
        }

    def merge(self, objective, gradients, point_gradients):
        for site, part in self._pairs(point_gradients):
            gradients = site.merge(objective, gradients, part)
        return gradients

    def groups(self, tensors):
        pairs = self._pairs(tensors)
        return [pairs] if self.joint_norm else [[pair] for pair in pairs]

    def describe(self, model):
        places = " and ".join(site.describe(model) for site in self.sites)
        return f"{places}, with one norm" if self.joint_norm else places

    def _pairs(self, tensors):
        """Each site with its tensors."""
        rest = iter(tensors)
        return [
            (site, [next(rest) for _ in range(size)])
            for site, size in zip(self.sites, self._step.sizes, strict=True)
        ]

    def _check_distinct(self):
        places = [site.place for site in self.sites if site.place is not None]
        if len(set(places)) < len(places):
            raise ValueError(
                "Expected `embedding_name` to name places that differ: two of "
                "them are the same layer or input. Received: names of "
                f"{[site.place[1] for site in self.sites if site.place]}"
            )
