"""Feature matching, for fmrun's own training and for anyone's: imports torch and nothing else of fmrun.

    L_G = L_adv + lambda * ramp * balance * reduce_k w_k d(S(f_k(r)), S(f_k(g)))

`layers` chooses the f_k, `statistics` has the S and d, `strength` the share of the gradient and the balance that holds
it, `term` all of it as one module.
"""

from .errors import FeatureMatchingError
from .layers import select_layers
from .term import Distance, FeatureMatching

__all__ = ["Distance", "FeatureMatching", "FeatureMatchingError", "select_layers"]
