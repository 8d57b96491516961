"""Which layers are matched."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from .discriminator import HEAD, Discriminator
from .errors import FeatureMatchingError


def select_layers(layers: Sequence[str | int], net: Discriminator) -> tuple[str, ...]:
    """The names that `layers` (names, indices, groups, `auto`, `head`) stand for, in the net's order, each once.

    Raises FeatureMatchingError for a layer the net does not have; nothing is ever dropped.
    """
    names = net.feature_names
    calls: Sequence[str] = getattr(net, "calls", names)  # of a walked net, more can be named than is listed
    aliases: Mapping[str, str] = getattr(net, "aliases", {})
    chosen: set[str] = set()
    for wanted in layers:
        layer = aliases.get(wanted, wanted) if isinstance(wanted, str) else wanted
        if isinstance(layer, int):
            if not -len(names) <= layer < len(names):
                raise FeatureMatchingError(f"feature_matching.layers: there is no layer {layer}; {_listing(names)}")
            chosen.add(names[layer])
        elif layer == "auto":
            chosen.add(net.auto)
        elif layer in net.groups:
            chosen.update(net.groups[layer])
        elif layer in calls or layer == HEAD:
            chosen.add(layer)
        else:
            known = [*calls, *aliases, *net.groups, "auto", HEAD]
            near = difflib.get_close_matches(layer, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise FeatureMatchingError(
                f"feature_matching.layers: there is no layer '{layer}'{hint}; {_listing(names)}; "
                f"groups: {', '.join(net.groups)}, auto; {HEAD}: the logits"
            )
    return tuple(name for name in (*calls, HEAD) if name in chosen)


def _listing(names: Sequence[str]) -> str:
    return "layers: " + ", ".join(f"{i} {name}" for i, name in enumerate(names))
