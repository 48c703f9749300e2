"""NVAE: deep hierarchical variational autoencoders (post 7574)."""

from blogkeras.nvae.model import NVAE
from blogkeras.nvae.presets import NVAEConfig

__all__ = ["NVAE", "NVAEConfig"]
