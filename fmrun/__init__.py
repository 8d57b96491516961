"""fmrun: an experiment runner for GANs with feature matching; `FeatureMatching` is for training loops of one's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .feature_matching import FeatureMatching

__all__ = ["FeatureMatching", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `FeatureMatching`, and torch with it, only when it is used: most commands answer without."""
    if name == "FeatureMatching":
        from .feature_matching import FeatureMatching

        return FeatureMatching
    raise AttributeError(f"module 'fmrun' has no attribute '{name}'")
