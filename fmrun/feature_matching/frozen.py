"""The discriminator in the generator's update: it passes gradients on, and nothing of it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as ParametrizedSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as HookedSpectralNorm


@contextmanager
def frozen(*nets: nn.Module) -> Iterator[None]:
    """Inside, the nets take no weight gradients, move no running statistics, make no power iteration, and compute
    parametrized weights once. In train mode they normalise by the batch as ever."""
    parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    with ExitStack() as stack:
        stack.enter_context(frozen_running_stats(*nets))
        stack.enter_context(_no_power_iteration(*nets))
        stack.enter_context(parametrize.cached())
        try:
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)


@contextmanager
def frozen_running_stats(*nets: nn.Module) -> Iterator[None]:
    """Inside, a train-mode forward normalises as ever but leaves batch norm's running averages where they are."""
    norms = [m for net in nets for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


@contextmanager
def _no_power_iteration(*nets: nn.Module) -> Iterator[None]:
    """Inside, torch's own spectral norms, of either kind, keep the vectors they have."""
    norms = [norm for net in nets for norm, _ in torch_spectral_norms(net) if norm.n_power_iterations]
    iterations = [norm.n_power_iterations for norm in norms]
    for norm in norms:
        norm.n_power_iterations = 0
    try:
        yield
    finally:
        for norm, count in zip(norms, iterations, strict=True):
            norm.n_power_iterations = count


def torch_spectral_norms(
    net: nn.Module,
) -> Iterator[tuple[HookedSpectralNorm | ParametrizedSpectralNorm, Callable[[], object]]]:
    """torch's own spectral norms in `net`, of either kind, each with the call that computes its weight."""
    for module in net.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, HookedSpectralNorm):
                yield hook, partial(hook.compute_weight, module, do_power_iteration=True)
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for chain in module.parametrizations.values():
                assert isinstance(chain, parametrize.ParametrizationList)
                for norm in chain:
                    if isinstance(norm, ParametrizedSpectralNorm) and hasattr(norm, "n_power_iterations"):
                        yield norm, partial(norm, chain.original)
