"""Batch norm and batch statistics over several processes, against one process with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.commands import fmrun  # noqa: F401, its module sets what the fork server imports
from support.helpers import WORLD, Noise, advance, checkpoint_of, differing, everything, tiny_config, tiny_state, worst
from torch import nn

from fmrun.feature_matching.frozen import frozen_running_stats
from fmrun.feature_matching.statistics import STATISTICS, random_directions
from fmrun.models.norm import GlobalBatchNorm, sync_batch_norm
from fmrun.runtime.dist import World
from fmrun.runtime.errors import UserError
from fmrun.train.state import State

RANKS = 2
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "mean unbiased": ("mean", {"estimator": "unbiased"}),
    "moments": ("moments", {}),
    "coral": ("coral", {}),
    "mmd": ("mmd", {}),
    "mmd rbf": ("mmd", {"kernel": "rbf"}),
    "sliced": ("sliced", {}),
    "sample": ("sample", {}),
}
RUN = {
    "train__batch_size": 8,
    "train__augment": ("color", "translation"),
    "feature_matching__weight": 0.3,
    "feature_matching__balance": "gradient",
    "losses__gan__r1": 1.0,
    "optim__clip_grad_norm": 5.0,
}


def whole_batch(seed: int = 0, shape: tuple[int, ...] = (8, 3, 4, 4)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_results(norm: nn.Module, x: torch.Tensor, world: World) -> dict[str, torch.Tensor]:
    """Output, gradients, gradients of a gradient penalty and running averages, as one process would have them."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    penalty = first.square().sum()
    second = torch.autograd.grad(penalty, (x, norm.weight))
    plain = torch.autograd.grad(norm(x).pow(3).sum(), (norm.weight, norm.bias))
    # a sum over the slice: its mean over processes times their number is the sum over the batch
    parts = {"y": y, "first": first, "second": second[0]}
    sums = {"second weight": second[1], "weight": plain[0], "bias": plain[1]}
    gathered = {n: world.gather(v.detach()) for n, v in parts.items()}
    summed = {n: world.mean(v.detach()) * world.size for n, v in sums.items()}
    return gathered | summed | {n: b.clone() for n, b in norm.named_buffers()}


def statistic_results(world: World) -> dict[str, torch.Tensor]:
    real, fake = whole_batch(1), whole_batch(2) * 0.7 + 0.2
    part = world.local_slice(8)
    found = {}
    for name, (match, options) in VARIANTS.items():
        leaf = fake[part].clone().requires_grad_()
        directions = random_directions(5, 48, torch.Generator().manual_seed(0), torch.float64)
        value = STATISTICS[match](real[part], leaf, ranks=world, directions=directions, **options)
        (gradient,) = torch.autograd.grad(value, leaf)
        found[name] = world.mean(value.detach())
        # weights' gradients are averaged over processes: size times too large here is right
        found[name + " gradient"] = world.gather(gradient) / world.size
    return found


def twice_differentiable(world: World) -> dict[str, torch.Tensor]:
    x = whole_batch(3, (4, 2))[world.local_slice(4)].clone().requires_grad_()
    ok = {}
    for name, work in (
        ("mean", lambda v: world.mean(v.pow(3)).sum()),
        ("gather", lambda v: world.gather(v.pow(3)).sum()),
    ):
        (first,) = torch.autograd.grad(work(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        ok[name + " first"], ok[name + " second"] = first.detach(), second
    return ok


def run_results(world: World) -> dict[str, torch.Tensor]:
    """Three steps of the whole recipe, with batch norm in both nets."""
    state = State(tiny_config(**RUN), torch.device("cpu"), world)
    feed = Noise(state.config)
    part = world.local_slice(8)

    class Slice:
        def batch(self, draw: int) -> torch.Tensor:
            return feed.batch(draw)[part]

    for step in range(3):
        state.advance(state.prepare(Slice(), step))
    row = state.window.read(world)
    return everything(state) | {"log " + n: torch.tensor(v, dtype=torch.float64) for n, v in row.items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    world = World(rank, RANKS)
    norm = sync_batch_norm(fresh_norm(), world, torch.device("cpu"), double_backward=True)
    assert isinstance(norm, GlobalBatchNorm)
    results = {
        "norm": norm_results(norm, whole_batch()[world.local_slice(8)], world),
        "eval": {"y": world.gather(norm.eval()(whole_batch(5)[world.local_slice(8)]).detach())},
        "statistics": statistic_results(world),
        "twice": twice_differentiable(world),
        "run": run_results(world),
        "any": {"any": torch.tensor([world.any(rank == 1), world.any(False)])},
    }
    lists = [torch.full((2, 2), float(rank)), torch.full((3,), 10.0 * rank)]
    world.average_(lists)
    results["average"] = {str(i): t for i, t in enumerate(lists)}
    results["shared"] = {"value": torch.tensor(world.from_first(7 if world.first else None))}
    try:
        with world.on_first_rank() as first:
            results["shared"]["first"] = torch.tensor(first)
            if first:
                raise UserError("no room")
    except UserError as error:
        results["shared"]["error"] = torch.tensor(str(error) == "no room")
    results["shared"]["all"] = torch.tensor(world.all_gather_object(rank))
    torch.save(results, f"{folder}/{rank}.pt")
    world.leave()


def fresh_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return norm


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # forked off a process that has torch imported (commands)
    mp.start_processes(worker, args=(str(folder),), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_global_batch_norm_is_batch_norm_on_the_whole_batch(ranks):
    """Forward, gradients, gradients of a gradient penalty (R1), running averages."""
    expected = norm_results(fresh_norm(), whole_batch(), WORLD)
    for rank in ranks:
        # here too, a gradient at the images is `size` times that of the mean over processes
        assert worst(rank["norm"], expected) < 1e-9 * max(float(v.abs().max()) for v in expected.values())


def test_global_batch_norm_in_eval_mode_uses_its_averages(ranks):
    norm = fresh_norm()
    norm_results(norm, whole_batch(), WORLD)
    assert torch.allclose(ranks[0]["eval"]["y"], norm.eval()(whole_batch(5)))


@pytest.mark.parametrize("name", VARIANTS)
def test_statistics_over_processes_are_those_of_the_whole_batch(ranks, name):
    expected = statistic_results(WORLD)
    for rank in ranks:
        for key in (name, name + " gradient"):
            assert torch.allclose(rank["statistics"][key], expected[key], rtol=1e-9, atol=1e-14), key


def test_mean_and_gather_are_differentiable_twice(ranks):
    x = whole_batch(3, (4, 2))
    # each process adds the same mean: d/dx of the average of x^3 is 3 x^2, as if alone with its slice
    for rank, found in enumerate(ranks):
        own = x[2 * rank : 2 * rank + 2]
        cube = 3 * own**2
        assert torch.allclose(found["twice"]["mean first"], cube)
        assert torch.allclose(found["twice"]["mean second"], 2 * cube * 6 * own)
        assert torch.allclose(found["twice"]["gather first"], RANKS * cube)
        assert torch.allclose(found["twice"]["gather second"], 2 * RANKS**2 * cube * 6 * own)


def test_two_processes_train_as_one(ranks):
    """Float64, three steps: batch norm, batch statistics, balance, R1, augmentation, clipping."""
    one = run_results(WORLD)
    assert differing(ranks[0]["run"], ranks[1]["run"]) == []
    assert worst(ranks[0]["run"], one) < 1e-7
    weights = [k for k in one if not k.startswith(("log", "adam"))]
    assert worst({k: ranks[0]["run"][k] for k in weights}, {k: one[k] for k in weights}) < 1e-9


def test_small_things_processes_agree_on(ranks):
    for number, rank in enumerate(ranks):
        assert rank["any"]["any"].tolist() == [True, False]
        assert rank["average"]["0"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert rank["average"]["1"].tolist() == [5.0] * 3
        assert rank["shared"]["value"].item() == 7
        assert rank["shared"]["first"].item() == (number == 0)
        assert rank["shared"]["error"].item()
        assert rank["shared"]["all"].tolist() == [0, 1]


def test_a_world_of_one_is_the_identity():
    world, x = World(), whole_batch()
    assert world.mean(x) is x
    assert world.gather(x) is x
    assert world.local_slice(6) == slice(0, 6)
    assert world.first
    before = x.clone()
    world.average_([x])
    assert torch.equal(x, before)
    assert [world.any(flag) for flag in (True, False)] == [True, False]
    assert world.from_first(5) == 5
    assert world.all_gather_object(5) == [5]
    with world.on_first_rank() as first:
        assert first
    norm = fresh_norm()
    assert sync_batch_norm(norm, world, torch.device("cpu"), True) is norm
    assert type(norm) is nn.BatchNorm2d


def test_parts_of_a_batch_cover_it_once():
    parts = [World(rank, 3).local_slice(12) for rank in range(3)]
    assert [i for p in parts for i in range(12)[p]] == list(range(12))


def test_global_batch_norm_alone_is_batch_norm_also_in_half_precision():
    own, torchs = fresh_norm().float(), fresh_norm().float()
    own.__class__ = GlobalBatchNorm
    assert own.state_dict().keys() == torchs.state_dict().keys()
    x = whole_batch().float()
    assert torch.allclose(own(x), torchs(x), atol=1e-5)
    assert torch.allclose(own.running_var, torchs.running_var)
    half = own(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), torchs(x), atol=0.05)


# Running statistics frozen, and fitted


def test_frozen_running_stats_normalise_by_the_batch_and_move_nothing():
    norm, twin = fresh_norm(), fresh_norm()
    expected = twin(whole_batch())
    before = {n: b.clone() for n, b in norm.named_buffers()}
    with frozen_running_stats(norm), frozen_running_stats(norm):
        assert torch.equal(norm(whole_batch()), expected)
    assert all(torch.equal(b, before[n]) for n, b in norm.named_buffers())
    norm(whole_batch())
    assert all(torch.equal(b, dict(twin.named_buffers())[n]) for n, b in norm.named_buffers())


def test_running_stats_are_let_go_after_an_error():
    norm = fresh_norm()
    with pytest.raises(ValueError, match="4D"), frozen_running_stats(norm):
        norm(torch.zeros(3))
    assert norm.track_running_stats


def test_frozen_running_stats_in_eval_mode_are_still_used():
    norm = fresh_norm().eval()
    norm.running_mean.fill_(3.0)
    expected = norm(whole_batch())
    with frozen_running_stats(norm):
        assert torch.equal(norm(whole_batch()), expected)


def test_ema_batch_norm_fits_the_weights_and_refitting_changes_nothing():
    state = tiny_state()
    average = state.task.average
    state.task.fit_average()
    variance = average.norm.running_var.clone()
    with torch.no_grad():
        average.project.weight.mul_(3)
    state.task.fit_average()
    assert torch.allclose(average.norm.running_var, 9 * variance)
    first = everything(state)
    state.task.fit_average()
    assert differing(first, everything(state)) == []


def test_ema_batch_norm_is_refitted_at_most_once_between_two_steps(monkeypatch):
    state = tiny_state()
    fits = []
    whole = state.task.fit_average
    monkeypatch.setattr(state.task, "fit_average", lambda: fits.append(state.step) or whole())
    state.fit_average()
    saved = checkpoint_of(state)
    assert fits == [0]
    advance(state)
    state.tensors()
    state.fit_average()
    assert fits == [0, 1]
    state.restore(saved)
    state.fit_average()
    assert fits == [0, 1, 0]
