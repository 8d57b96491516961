"""fmrun: an experiment runner for GANs with feature matching."""

__version__ = "0.1.0"
