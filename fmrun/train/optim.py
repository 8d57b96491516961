"""Adam whose non-finite updates never happen, learning-rate schedules, and the generator's moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config.schema import AdamConfig, EmaConfig, ScheduleConfig
from ..runtime.dist import World

SMALLEST_SCALE = 2.0**-6
"""fp16: a loss scale below this means that the loss itself, not its scale, overflows."""


def lr_factor(schedule: ScheduleConfig, step: int) -> float:
    """Factor on the learning rates at `step`, in [0, 1]."""
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.decay != "none":
        done = (step - schedule.decay_start) / (schedule.decay_end - schedule.decay_start)
        done = min(1.0, max(0.0, done))
        left = 1 - done if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        factor *= schedule.final_factor + (1 - schedule.final_factor) * left
    return factor


class Guard(nn.Module):
    """Remembers, on the device, the first non-finite update; from then on every update is masked.

    Nothing waits for it: the loop reads it when it prints, and never saves without reading it.
    """

    bad: Tensor
    scale: Tensor
    good_steps: Tensor

    def __init__(self, scaled: bool):
        super().__init__()
        self.scaled = scaled
        self.register_buffer("bad", torch.full((2,), -1, dtype=torch.int64))  # step, which net (0 D, 1 G)
        self.register_buffer("scale", torch.tensor(2.0**16 if scaled else 1.0))
        self.register_buffer("good_steps", torch.zeros(()))

    @torch.no_grad()
    def skip(self, norm: Tensor, step: Tensor | int, net: int) -> Tensor:
        """1.0 if the update with this gradient norm must not happen, else 0.0; takes note of why.

        Chooses by arithmetic: `torch.where` would wait for the device to take a number from the host.
        """
        finite = torch.isfinite(norm)
        fatal = ~finite
        if self.scaled:
            self.good_steps.add_(1).mul_(finite)
            grown = self.good_steps >= 2000
            self.scale.mul_(0.5 + 0.5 * finite + 1.0 * grown)
            self.good_steps.mul_(~grown)
            fatal = fatal & (self.scale < SMALLEST_SCALE)
        first = fatal & (self.bad[0] < 0)
        for place, value in enumerate((step, net)):
            self.bad[place].mul_(~first).add_(first * value)
        return (~finite | (self.bad[0] >= 0)).to(torch.float32)

    def read(self) -> tuple[int, int] | None:
        """(step, net) of the first non-finite update, or None. Waits for the device."""
        step, net = self.bad.tolist()
        return (step, net) if step >= 0 else None


class GuardedAdam(torch.optim.Adam):
    """Adam with what its fused kernel reads where it is set."""

    found_inf: Tensor
    """Not zero: leave all as it is."""
    grad_scale: Tensor
    """What gradients are divided by."""


class Optimiser:
    """Adam on one net: averages gradients over processes, clips, and skips what is not finite, all on the device."""

    def __init__(
        self,
        net: nn.Module,
        config: AdamConfig,
        *,
        clip: float | None,
        guard: Guard,
        index: int,
        world: World,
        device: torch.device,
    ):
        self.names, self.parameters = zip(*net.named_parameters(), strict=True)
        self.config, self.clip, self.guard, self.index, self.world = config, clip, guard, index, world
        self.lr = torch.tensor(config.lr, device=device)
        self.adam = GuardedAdam(self.parameters, lr=self.lr, betas=config.betas, eps=config.eps, fused=True)
        # fp16 skips updates in good health; what such a forward put into running averages has to go with it
        self.averages = [b for b in net.buffers() if b.is_floating_point()] if guard.scaled else []
        self.remember()

    def remember(self) -> None:
        """Take the net's running averages as those of the last good update."""
        self.kept = [b.clone() for b in self.averages]

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, step: Tensor | int, scale: Tensor | None = None) -> Tensor:
        """Update the weights from the gradients they hold; returns the gradient norm before clipping.

        `step` is for the guard's notes; `scale` is the loss scale that the gradients carry, where the guard may have changed its own since.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.world.average_(grads)
        scale = self.guard.scale.clone() if scale is None else scale
        norm = torch.nn.utils.get_total_norm(grads) / scale
        skip = self.guard.skip(norm, step, self.index)
        if self.clip is not None:
            scale = scale * (norm / self.clip).clamp(min=1.0).to(scale.dtype)
        self.adam.found_inf = skip
        if self.clip is not None or self.guard.scaled:
            self.adam.grad_scale = scale
        if self.lr.is_cuda:
            # the fused kernel is the same; torch refuses to record without this, and warns of it where nothing is recorded
            for group in self.adam.param_groups:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        self.adam.step()
        for average, kept in zip(self.averages, self.kept, strict=True):
            kept.copy_(torch.where(skip > 0, kept, average))
            average.copy_(kept)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name."""
        return {
            f"{name}/{key}": value
            for name, p in zip(self.names, self.parameters, strict=True)
            for key, value in self.adam.state[p].items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Moments take their parameter's memory format: the fused kernel pairs elements by
        their place in memory."""
        for name, p in zip(self.names, self.parameters, strict=True):
            entry = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}/{key}" not in state:
                    continue
                saved = state[f"{name}/{key}"]
                entry[key] = torch.empty_like(p).copy_(saved) if key != "step" else saved.to(p.device, copy=True)
            if entry:
                self.adam.state[p] = entry


class Ema:
    """Exponential moving average of a net's weights; buffers are fitted to them separately (`Generate.fit_average`)."""

    def __init__(self, average: nn.Module, config: EmaConfig):
        self.net, self.config = average.requires_grad_(False), config

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move towards `net`, whose weights have been updated `step` + 1 times."""
        decay = min(self.config.decay, (1 + step) / (self.config.warmup + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
