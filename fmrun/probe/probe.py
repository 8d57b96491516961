"""`probe-layers`: what each layer of the discriminator is, costs and sees.

Everything is looked at as training would: batch norm by the batch, real and generated images apart, augmented, in the
configured precision. Nothing is changed: neither weights nor buffers nor random streams.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config, FeatureMatchingConfig
from ..feature_matching import FeatureMatching, select_layers
from ..feature_matching.frozen import frozen, frozen_running_stats
from ..models.base import parameter_count
from ..models.custom import user_errors
from ..models.norm import restored_buffers
from ..runs import checkpoint
from ..runs.checkpoint import named
from ..runtime.dist import World
from ..runtime.precision import choose_device, choose_precision, set_determinism, storage_dtype
from ..runtime.report import Reporter, format_table
from ..runtime.rng import torch_generator
from ..tasks import Batch, StepPlan, kind
from ..train.health import share_sentence
from ..train.start_checks import (
    LOOK,
    blind,
    blind_sentence,
    compared,
    enumerate_names,
    features_of,
    full_plan,
    matching_on,
    passes_gradient,
)
from ..train.state import State
from ..train.step import image_gradients
from .layers import activation_bytes, flops, receptive_fields

PATIENCE = 2.0
"""Seconds between two words on how far it is."""


def probe(
    config: Config,
    *,
    run_checkpoint: checkpoint.Checkpoint | None,
    data: bool,
    report: Reporter,
) -> dict[str, Any]:
    """What every layer of the config's discriminator is, costs and, with `data`, sees; see `examine` for the keys.

    The nets are those of `run_checkpoint`, or as a run of this config would start with them. With `data` the images
    are the batch that training would take next. Notes and warnings go to `report`, and into the result.
    Raises UserError for a config, device or data that training would refuse.
    """
    notes = []
    device = choose_device(config.device)
    choose_precision(config.precision, device)
    set_determinism(config.deterministic, device)
    images = None
    if data:
        images = kind(config.task).open(config, report.counting("checking images"))
        config = images.config
    elif config.data.channels is None:
        channels = 1 if config.data.path == "bundled:fashion-mnist" else 3
        notes.append(f"the data was not looked at: taking its images to have data.channels={channels}")
        config = config.model_copy(update={"data": config.data.model_copy(update={"channels": channels})})
    config = config.model_copy(update={"compile": False})
    state = State(config, device, World(), fresh=run_checkpoint is None)
    if run_checkpoint is not None:
        # The balance of other layers is still a start; a running mean of theirs is not.
        own = named({f"matching.{d.name}": d.matching.state_dict() for d in state.task.discriminators if d.matching})
        saved = {
            k: v for k, v in run_checkpoint.tensors.items() if not k.startswith("matching.") or ".running_" not in k
        }
        state.restore(replace(run_checkpoint, tensors={**own, **saved}))
    elif data:
        notes.append("the nets are as a run starts with them: gap and share describe untrained nets")
    batches = None
    if images is not None:
        feed = images.feed(state.world, device, state.step * state.batches_per_step)
        try:
            batches = state.prepare(feed, state.step)[0]
        finally:
            feed.close()
    result = examine(state, batches, report.counting("layers measured", PATIENCE))
    result["step"] = state.step if run_checkpoint is not None else None
    result["notes"] = notes + result["notes"]
    for note in result["notes"]:
        report.note(note)
    for sentence in result["warnings"]:
        report.warn(sentence)
    return result


@user_errors()
def examine(
    state: State, batches: Sequence[Batch] | None, tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Look at the discriminator of `state` without changing anything; with `batches`, the micro-batches of one update,
    also at what it sees. JSON can hold the result, in which `layers` has for each layer, in the net's order

    - `index`, `name`, `shape` (C, H, W), `channels`, `selected` (whether the config matches it)
    - `receptive_field`: see `receptive_fields`
    - `flops`: of convolutions and matrix products of a forward that ends there, for one image; `flops_share`: over
      those of the whole forward with logits
    - `activation_bytes`: see `activation_bytes`
    - `gradient`: whether one reaches the image
    - `gap`: see `gap`; `blind`: see `blind`; `gradient_share`: ||grad lambda L_FM|| / ||grad L_adv|| at the generated
      images if this layer alone were matched, unbalanced. None without `batches`.

    `share` and `balance_factor` are those of the configured layers together. `lambda` is the configured weight, at
    its full strength, or 1 where that is 0. Where no adversarial term ever acts, the shares are of the other generator
    losses, or None if there are none. `tell` hears how many of how many layers are done.
    """
    config, task, device = state.config, state.task, state.device
    role = task.discriminators[0]
    net: Any = role.net
    names: tuple[str, ...] = net.feature_names
    fm = config.feature_matching
    selected = select_layers(fm.layers, net)
    weight = fm.weight or 1.0
    image_shape = role.image
    cuda = [device.index] if device.type == "cuda" else []

    done, total = itertools.count(1), len(names) * (1 if batches is None else 2)

    def tick() -> None:
        tell(next(done), total)

    with torch.random.fork_rng(devices=cuda), restored_buffers(net), restored_buffers(task.generator):
        fields = receptive_fields(net, image_shape, config.seed, tick)
        with frozen(*(d.net for d in task.discriminators)):
            rng = torch_generator(config.seed, "probe", 0)
            noise = (torch.rand(LOOK, *image_shape, generator=rng) * 2 - 1).to(device, storage_dtype(task.precision))
            noise = noise.contiguous(memory_format=torch.channels_last)
            costs, shapes, whole = flops(net, noise[:2])
            layers: list[dict[str, Any]] = [
                {
                    "index": i,
                    "name": name,
                    "shape": list(shapes[name]),
                    "channels": shapes[name][0],
                    "receptive_field": fields[name],
                    "flops": costs[name],
                    "flops_share": costs[name] / whole if whole else None,
                    "activation_bytes": activation_bytes(role, name, noise, config.train.batch_size),
                    "gradient": passes_gradient(role, name, noise),
                    "selected": name in selected,
                    "gap": None,
                    "gradient_share": None,
                    "blind": None,
                }
                for i, name in enumerate(names)
            ]
            share = balance = None
            if batches is not None:
                with frozen_running_stats(task.generator), torch.no_grad():
                    images = [task.generate(batch) for batch in batches]
                real = features_of(role, batches, [batch.real for batch in batches], names)
                fake = features_of(role, batches, images, names)
                for layer in layers:
                    name = layer["name"]
                    alone = matching_on(state, (name,), weight=weight, layer_weights="uniform", balance="none")
                    layer["gap"] = _finite(gap(real[name], fake[name], config.has_targets))
                    layer["blind"] = blind(state, name, real[name], fake[name])
                    layer["gradient_share"] = _share(state, alone, layer["gradient"], batches, images)
                    tick()
                matching_of_all = matching_on(state, selected, weight=weight)
                if role.matching is not None:
                    matching_of_all.load_state_dict(role.matching.state_dict())
                reached = any(layer["gradient"] and layer["selected"] for layer in layers)
                reached = reached or any(passes_gradient(role, name, noise) for name in selected if name not in names)
                share = _share(state, matching_of_all, reached, batches, images)
                balance = float(matching_of_all.strength.balance)

    result = {
        "task": config.task,
        "discriminator": config.discriminator.model_dump(include={"type", "target", "width", "norm"}),
        "weights": parameter_count(net),
        "image": list(image_shape),
        "batch_size": config.train.batch_size,
        **fm.model_dump(include={"match", "criterion", "elements", "balance"}),
        "lambda": weight,
        "share": share,
        "share_of": compared(role),
        "balance_factor": balance if share is not None else None,
        "flops": whole,
        "groups": {name: list(members) for name, members in net.groups.items()},
        "auto": net.auto,
        "layers": layers,
        "notes": [],
        "warnings": [],
    }
    result["notes"], result["warnings"] = _notes(result, fm), _warnings(result, fm)
    if unlisted := [name for name in selected if name not in names]:
        result["notes"].append(f"matched, and not listed: {', '.join(unlisted)}")
    return result


def gap(real: Tensor, fake: Tensor, has_targets: bool = False) -> float:
    """How far apart the features (B, …) of real and generated images are, in units of how far each spreads:

        (||mu_r - mu_g||^2 - (tr S_r + tr S_g) / B) / ((tr S_r + tr S_g) / 2)

    means mu and variances S per position. The numerator is unbiased: 0 on average where the means are equal (so a
    little below as often as above), and comparable between layers of any scale and width. Behind a batch norm, which sees each
    batch whole, features of a batch are not independent, and it comes out too low. Where images have targets (`has_targets`),
    each at the place of its own, it is the mean of ||f_r - f_g||^2 over the same denominator: 0 where they are
    equal, 2 where they have nothing in common.
    """
    real, fake = real.cpu().double(), fake.cpu().double()
    spread = (real.var(0) + fake.var(0)).sum()
    if has_targets:
        return float((real - fake).square().sum() / len(real) / (spread / 2))
    distance = (real.mean(0) - fake.mean(0)).square().sum()
    return float((distance - spread / len(real)) / (spread / 2))


def _share(
    state: State, matching: FeatureMatching, reached: bool, batches: Sequence[Batch], images: Sequence[Tensor]
) -> float | None:
    """Gradient share of `matching`, measured as training does, every term at its full weight; `reached` is whether
    any of its layers passes a gradient to the image."""
    task = copy.copy(state.task)
    role = copy.copy(task.discriminators[0])
    role.matching = matching
    task.discriminators = (role,)
    image_losses = task.plan(state.step).image_losses
    plan = full_plan(role)
    if not (plan.adversarial or image_losses):
        return None
    if not reached:
        return 0.0
    scalars = task.scalars()
    scalars.set(state.step, [role.gan.weight], [matching.weight], task.image_weights(state.step))
    image_gradients(task, StepPlan((plan,), image_losses=image_losses), batches, images, scalars, state.world)
    return _finite(float(matching.strength.share))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _notes(result: Mapping[str, Any], fm: FeatureMatchingConfig) -> list[str]:
    if result["share"] is None:
        return []
    effective = f"λ {result['lambda']:.4g} × balance {result['balance_factor']:.4g}"
    off = "" if fm.weight else " (off in this config: looked at with λ = 1)"
    share = f"its gradient is {100 * result['share']:.3g} % of {result['share_of']}"
    return [f"feature matching of the selected layers{off}: {effective}: {share}"]


def _warnings(result: Mapping[str, Any], fm: FeatureMatchingConfig) -> list[str]:
    layers = result["layers"]
    cut = [layer["name"] for layer in layers if not layer["gradient"]]
    hidden = [layer["name"] for layer in layers if layer["blind"]]
    sentences = []
    if cut:
        sentences.append(
            f"no gradient reaches the image from {enumerate_names(cut)}, so matching there teaches the generator nothing; "
            "leave that out of feature_matching.layers, or let gradients through"
        )
    if hidden:
        sentences.append(
            blind_sentence(
                fm.match, hidden, [layer["name"] for layer in layers], result["discriminator"]["target"] is not None
            )
        )
    if result["share"] is not None and fm.weight:
        sentence = share_sentence(result["share"], fm.weight, result["share_of"], fm.balance == "gradient")
        if sentence:
            sentences.append(sentence)
    return sentences


def layer_table(result: Mapping[str, Any]) -> str:
    """The layers of a result for the terminal; sizes and shares have their units in the head."""
    seen = any(layer["gap"] is not None for layer in result["layers"])
    columns = ["#", "layer", "shape", "channels", "sees px", "MFLOPs", "cost %", "memory MB", "gradient"]
    columns += ["real-fake gap", "share %", "blind"] if seen else []
    rows = []
    for layer in result["layers"]:
        row = [
            layer["index"],
            layer["name"],
            " × ".join(map(str, layer["shape"])),
            layer["channels"],
            layer["receptive_field"],
            layer["flops"] / 1e6,
            _percent(layer["flops_share"]),
            layer["activation_bytes"] / 1e6,
            "yes" if layer["gradient"] else "NO",
        ]
        if seen:
            row += [layer["gap"], _percent(layer["gradient_share"]), "BLIND" if layer["blind"] else "no"]
        rows.append([*row, "*" if layer["selected"] else ""])
    return format_table([*columns, "matched"], rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
