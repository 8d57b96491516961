"""Normalisation whose statistics move exactly when the training step says so, and over the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as HookedSpectralNorm

from ..feature_matching.frozen import torch_spectral_norms
from ..runtime.dist import World

_BatchNorm = nn.modules.batchnorm._BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the batch of all processes, of any number of dimensions, on any device, differentiable twice.

    torch's `SyncBatchNorm` runs on CUDA only and has no double backward, which R1 needs. Parameters, buffers and
    state-dict names are those of torch's batch norms.
    """

    world = World()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        dims = [0, *range(2, x.ndim)]
        shape = (-1, *[1] * (x.ndim - 2))
        mean = self.world.mean(wide.mean(dims))
        centred = wide - mean.view(shape)
        var = self.world.mean(centred.square().mean(dims))
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                count = x.numel() // x.shape[1] * self.world.size
                self.num_batches_tracked.add_(1)
                # without momentum torch takes the mean over all batches
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), momentum)
        scale = torch.rsqrt(var + self.eps)
        made = centred * (scale if self.weight is None else self.weight * scale).view(shape)
        return (made if self.bias is None else made + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any will do."""


def sync_batch_norm(net: nn.Module, world: World, device: torch.device, double_backward: bool) -> nn.Module:
    """Make every batch norm of `net` see the batch of all processes."""
    if world.size == 1:
        return net
    if device.type == "cuda" and not double_backward:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.__class__ = GlobalBatchNorm  # type: ignore[assignment]
            module.world = world  # type: ignore[assignment]
    return net


@contextmanager
def restored_buffers(*modules: nn.Module | None) -> Iterator[None]:
    """Put every buffer of these modules back at the end."""
    saved = [(m, {name: b.clone() for name, b in m.named_buffers()}) for m in modules if m is not None]
    try:
        yield
    finally:
        for module, buffers in saved:
            for name, value in buffers.items():
                module.get_buffer(name).copy_(value)


@contextmanager
def perturbed(net: nn.Module) -> Iterator[None]:
    """Inside, every weight has a little noise, the same every time: what begins at zero is seen to belong to the net."""
    weights = [(p, p.detach().clone()) for p in net.parameters()]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, original in weights:
            p.copy_(original + 0.02 * torch.randn(p.shape, generator=rng, dtype=torch.float32).to(original))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, original in weights:
                p.copy_(original)


def has_spectral_norm(net: nn.Module) -> bool:
    chains: list[Any] = [m.parametrizations for m in net.modules() if parametrize.is_parametrized(m, "weight")]
    has_own = any(isinstance(norm, SpectralNorm) for chain in chains for norm in chain["weight"])
    return has_own or any(True for _ in torch_spectral_norms(net))


def has_batch_norm(net: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in net.modules())


class SpectralNorm(nn.Module):
    """Parametrization W / sigma(W), sigma by power iteration (Miyato et al. 2018, eq. 8).

    A forward never iterates: `advance` does, once per discriminator update, so that all forwards between two updates
    see the same weights. The gradient flows through sigma = u^T W v with u and v constant, as published.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        matrix = _matrix(weight.detach())
        u = torch.randn(matrix.shape[0], generator=generator, dtype=weight.dtype)
        v = torch.randn(matrix.shape[1], generator=generator, dtype=weight.dtype)
        self.register_buffer("u", F.normalize(u, dim=0))
        self.register_buffer("v", F.normalize(v, dim=0))
        self.advance(weight, iterations=15)

    @torch.no_grad()
    def advance(self, weight: Tensor, iterations: int = 1) -> None:
        matrix = _matrix(weight)
        for _ in range(iterations):
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            # u and v move in place between updates, so a graph must own the values it saw
            sigma = torch.dot(self.u.clone(), torch.mv(_matrix(weight), self.v.clone()))
            return weight / sigma


def _matrix(weight: Tensor) -> Tensor:
    """Weights (outputs, …) as a matrix; a vector is one column."""
    return weight.reshape(weight.shape[0], -1)


def spectral_norm(module: nn.Module, generator: torch.Generator) -> None:
    """Give `module.weight` (outputs, …), already initialised and not zero, spectral norm."""
    norm = SpectralNorm(module.get_parameter("weight"), generator)
    parametrize.register_parametrization(module, "weight", norm, unsafe=True)


def hold_spectral(net: nn.Module) -> None:
    """Make torch's own spectral norms in `net` iterate in `advance_spectral` and nowhere else.

    By themselves they iterate in every train-mode forward, so that no two forwards see the same weights.
    """
    for norm, compute in torch_spectral_norms(net):
        if isinstance(norm, HookedSpectralNorm):  # the older kind begins with random vectors, and a norm near 0
            norm.n_power_iterations = 15
            compute()
        norm.n_power_iterations = 0


@torch.no_grad()
def advance_spectral(net: nn.Module) -> None:
    """One power iteration of every spectral norm in `net`."""
    for norm, compute in torch_spectral_norms(net):
        if norm.n_power_iterations == 0:
            norm.n_power_iterations = 1
            compute()
            norm.n_power_iterations = 0
    for module in net.modules():
        if parametrize.is_parametrized(module, "weight"):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            chain = module.parametrizations["weight"]
            assert isinstance(chain, parametrize.ParametrizationList)
            for parametrization in chain:
                if isinstance(parametrization, SpectralNorm):
                    parametrization.advance(chain.original)
