"""`from fmrun import FeatureMatching`: feature matching in a training loop that is not fmrun's."""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.helpers import Calls, differing, tensors_of
from torch import nn

import fmrun
from fmrun import FeatureMatching
from fmrun.feature_matching import FeatureMatchingError
from fmrun.feature_matching.statistics import STATISTICS
from fmrun.models.dcgan import DcganDiscriminator
from fmrun.models.munet import MUNet
from fmrun.runtime.dist import World

IMAGE = (1, 16, 16)
LIBRARY = Path(fmrun.__file__).parent / "feature_matching"


def noise(seed: int, count: int = 6, image: tuple[int, int, int] = IMAGE) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, *image, generator=rng, dtype=torch.float64) * 2 - 1


def plain(spectral: bool = False) -> nn.Module:
    """A discriminator as people write them."""
    norm = nn.utils.parametrizations.spectral_norm if spectral else lambda m: m
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            norm(nn.Conv2d(1, 4, 4, 2, 1)),
            nn.LeakyReLU(0.2, inplace=True),
            norm(nn.Conv2d(4, 8, 4, 2, 1)),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 1, 4),
            nn.Flatten(0),
        ).double()


class Says(nn.Module):
    """A discriminator that says itself what its features are."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = plain(), wrap

    def forward_with_features(self, x):
        first = self.net[:2](x)
        second = self.net[2:5](first)
        return self.net[5:](second), self.wrap(first, second)

    def forward(self, x):
        return self.net(x)


def generated(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """What a generator's weight makes, and that weight."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    return weight * noise(seed), weight


def test_importing_fmrun_imports_no_torch_until_it_is_needed():
    code = "import sys, fmrun; assert 'torch' not in sys.modules; from fmrun import FeatureMatching; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'FeatureMatchin'"):
        fmrun.FeatureMatchin  # noqa: B018


def test_the_library_imports_nothing_else_of_fmrun():
    files = sorted(LIBRARY.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name} imports from above"
                names = [node.module or ""] if node.level == 0 else []
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "fmrun" for name in names), file.name
            third = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert third <= {"torch"}, file.name


@pytest.mark.parametrize("match", STATISTICS)
@pytest.mark.parametrize("balance", ["none", "gradient"])
def test_combine_is_the_sum_that_one_would_write_by_hand(match, balance):
    net = plain()
    matching = FeatureMatching(net, IMAGE, layers=["1", "4"], weight=0.3, match=match, balance=balance, directions=8)
    fake, weight = generated()
    logits, distance = matching(noise(1), fake, step=0)
    assert torch.equal(logits, net(fake))
    loss = matching.combine(F.softplus(-logits).mean(), distance, fake)
    (gradient,) = torch.autograd.grad(loss, weight)

    image = fake.detach().requires_grad_()
    half = {"1": net[:2], "4": net[:5]}
    directions = {}
    for place, (name, part) in enumerate(half.items()):
        rows = torch.randn(
            8, part(image)[0].numel(), generator=torch.Generator().manual_seed(place), dtype=torch.float64
        )
        directions[name] = F.normalize(rows, dim=1)
    terms = {
        name: STATISTICS[match](part(noise(1)).detach(), part(image), ranks=World(), directions=directions[name])
        for name, part in half.items()
    }
    total, adversarial = (terms["1"] + terms["4"]) / 2, F.softplus(-net(image)).mean()
    of_total, of_adversarial = (torch.autograd.grad(x, image, retain_graph=True)[0] for x in (total, adversarial))
    ratio = (of_total.norm() / of_adversarial.norm()).item()
    expected_balance = 1 / ratio if balance == "gradient" else 1.0
    assert {k: v.item() for k, v in distance.terms.items()} == pytest.approx({k: v.item() for k, v in terms.items()})
    assert matching.strength.balance.item() == pytest.approx(expected_balance, rel=1e-9)
    assert matching.strength.share.item() == pytest.approx(0.3 * expected_balance * ratio, rel=1e-9)
    assert loss.item() == pytest.approx((adversarial + 0.3 * expected_balance * total).item(), rel=1e-9)
    expected = ((of_adversarial + 0.3 * expected_balance * of_total) * noise(2)).sum()
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("wrap", "layers", "names"),
    [
        (lambda a, b: [a, b], [0, -1], ("0", "1")),
        (lambda a, b: (a, b), "all", ("0", "1")),
        (lambda a, b: {"second": b, "first": a}, ["first", "second"], ("second", "first")),
        (lambda a, b: {"first": a, "second": b}, ["auto", "head"], ("second", "head")),
    ],
    ids=["list", "tuple", "dict", "the last and the head"],
)
def test_a_network_that_says_its_features_is_matched_at_those(wrap, layers, names):
    net = Says(wrap)
    matching = FeatureMatching(net, IMAGE, layers=layers, match="sample", balance="none")
    assert matching.layers == names
    fake, _ = generated()
    logits, distance = matching(noise(1), fake)
    assert torch.equal(logits, net(fake))
    walked = {"first": "1", "second": "4", "0": "1", "1": "4", "head": "head"}
    twin = FeatureMatching(plain(), IMAGE, layers=[walked[name] for name in names], match="sample", balance="none")
    assert {walked[k]: v.item() for k, v in distance.terms.items()} == {
        k: v.item() for k, v in twin(noise(1), fake)[1].terms.items()
    }


def test_features_that_are_none_are_refused():
    for wrap in (lambda a, b: a, lambda a, b: [a, "b"], lambda a, b: []):
        with pytest.raises(FeatureMatchingError, match="return"):
            FeatureMatching(Says(wrap), IMAGE)


@pytest.mark.parametrize(
    "net",
    [
        lambda: DcganDiscriminator(28, 1, 4, "batch", torch.Generator().manual_seed(0)),
        lambda: MUNet(1, 4, torch.Generator().manual_seed(0)),
        plain,
    ],
)
def test_any_network_takes_part(net):
    net = net().double()
    image = (1, 32, 32) if isinstance(net, MUNet) else (1, 28, 28) if isinstance(net, DcganDiscriminator) else IMAGE
    matching = FeatureMatching(net, image, layers="all")
    fake = noise(1, image=image).requires_grad_()
    _, distance = matching(noise(0, image=image), fake)
    (gradient,) = torch.autograd.grad(distance.total, fake)
    assert gradient.abs().sum() > 0
    assert matching.strength.balance.dtype == torch.float64


# What the discriminator is spared


@pytest.mark.parametrize("make", [lambda: plain(spectral=True), lambda: Says(lambda a, b: [a, b])])
def test_the_discriminator_takes_no_gradient_and_nothing_of_it_moves(make):
    net = make()
    assert net.training
    before = tensors_of(net)
    matching = FeatureMatching(net, IMAGE, layers="all", estimator="running")
    for step in range(2):
        fake, weight = generated(step)
        logits, distance = matching(noise(step + 5), fake, step)
        matching.combine(-logits.mean(), distance, fake).backward()
        assert weight.grad.abs() > 0
    assert differing(before, tensors_of(net)) == []
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    net(noise(3)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert differing(before, tensors_of(net)) != []


def test_one_pass_over_fakes_and_a_shorter_graphless_one_over_reals():
    net, fake = plain(), generated()[0]
    matching, run = FeatureMatching(net, IMAGE, layers=["1"]), []
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, x, y, name=name: run.append((name, y.requires_grad)))
    _, distance = matching(noise(1), fake)
    assert run == [(name, True) for name in "0123456"] + [("0", False)]  # it ends within the hook of layer 1
    run.clear()
    with torch.no_grad():
        net.train()(fake)
    assert len(run) == 7
    assert distance.total.requires_grad
    calls, face = Calls(d := DcganDiscriminator(28, 1, 4, "none", torch.Generator()).double()), (1, 28, 28)
    FeatureMatching(d, face, layers=["block1"])(noise(1, image=face), noise(2, image=face).requires_grad_())
    assert [(c["layers"], c["logits"], c["grad"], c["weights"]) for c in calls.asked] == [
        (("block1",), True, True, False),
        (("block1",), False, False, False),
    ]


def test_before_its_start_real_images_are_not_looked_at():
    net, fake = plain(), generated()[0]
    matching, run = FeatureMatching(net, IMAGE, start_step=3, ramp=2, weight=0.5, balance="none"), []
    net[0].register_forward_hook(lambda *_: run.append(1))
    logits, distance = matching(noise(1), fake, step=2)
    assert (len(run), distance.total.item(), distance.terms) == (1, 0.0, {})
    adversarial = -logits.mean()
    assert matching.combine(adversarial, distance, fake) is adversarial
    assert [matching.ramped(step) for step in (2, 3, 4, 5, 9)] == [0, 0, 0.25, 0.5, 0.5]


def test_the_share_is_measured_when_it_is_due():
    net = plain()
    matching, grads = FeatureMatching(net, IMAGE, weight=0.2, measure_every=10), []
    for step in (0, 31, 33, 40):
        fake, _ = generated(step)
        fake.register_hook(lambda g: grads.append(g))
        logits, distance = matching(noise(step + 50), fake, step)
        shares = matching.strength.share.item()
        matching.combine(-logits.mean(), distance, fake)
        assert (matching.strength.share.item() == shares) == (step == 33)


def test_in_half_precision_features_are_half_and_statistics_are_not():
    net, fake = plain().float(), noise(2).float()
    for match in STATISTICS:
        matching = FeatureMatching(net, IMAGE, layers=["0", "2"], match=match, weight=0.3, criterion=None)
        exact = FeatureMatching(net, IMAGE, layers=["0", "2"], match=match, weight=0.3, criterion=None)
        leaf, other = fake.clone().requires_grad_(), fake.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, distance = matching(noise(1).float(), leaf)
            assert logits.dtype == torch.bfloat16
            loss = matching.combine(F.softplus(-logits.float()).mean(), distance, leaf)
        loss.backward()
        assert distance.total.dtype == torch.float32
        logits, expected = exact(noise(1).float(), other)
        exact.combine(F.softplus(-logits).mean(), expected, other).backward()
        assert distance.total.item() == pytest.approx(expected.total.item(), rel=0.05, abs=2e-3), match
        assert torch.nn.functional.cosine_similarity(leaf.grad.flatten(), other.grad.flatten(), 0) > 0.99, match


def test_matrix_products_of_statistics_are_not_in_half_precision():
    """Inside autocast torch would make them so."""
    features = {"0": noise(1, image=(4, 8, 8)).float()}, {"0": noise(2, image=(4, 8, 8)).float()}
    net = nn.Sequential(nn.LeakyReLU(1.0), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 1))
    for match in ("coral", "mmd", "sliced"):
        matching = FeatureMatching(net, (4, 8, 8), layers=["0"], match=match)
        exact = matching(features[0]["0"], features[1]["0"])[1].total
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = matching(features[0]["0"], features[1]["0"])[1].total
        assert inside.item() == exact.item(), match


# State


@pytest.mark.parametrize("settings", [{"estimator": "running"}, {"match": "sliced"}])
def test_state_goes_round_to_the_bit(tmp_path, settings):
    net = plain()

    def steps(matching: FeatureMatching, first: int) -> list[float]:
        losses = []
        for step in range(first, first + 3):
            fake, _ = generated(step)
            logits, distance = matching(noise(step + 50), fake, step)
            losses.append(matching.combine(-logits.mean(), distance, fake).item())
        return losses

    whole, half, rest = (FeatureMatching(net, IMAGE, layers=["1"], **settings) for _ in range(3))
    steps(half, 0)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    rest.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert steps(whole, 0) + steps(rest, 3) == steps(FeatureMatching(net, IMAGE, layers=["1"], **settings), 0) + steps(
        half, 3
    )
    assert not any(name.startswith("net") or "conv" in name for name in whole.state_dict())
    assert list(whole.parameters()) == []


def test_a_copy_is_a_matching_of_its_own():
    matching = FeatureMatching(plain(), IMAGE, layers=["1"])
    twin = copy.deepcopy(matching)
    fake, _ = generated()
    logits, distance = twin(noise(1), fake)
    twin.combine(-logits.mean(), distance, fake)
    assert matching.strength.balance.item() == 1.0 != twin.strength.balance.item()


# What is refused


@pytest.mark.parametrize("match", ["sample", "mean", "coral"])
def test_maps_of_different_sizes_are_an_error_or_averaged_down(match):
    net, larger = nn.Sequential(*plain()[:5], nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 1, 1).double()), (1, 32, 32)
    real, fake = noise(1, image=larger), noise(2).requires_grad_()
    with pytest.raises(FeatureMatchingError, match=r"layer '1' has shape \(6, 4, 16, 16\) for real and \(6, 4, 8, 8\)"):
        FeatureMatching(net, IMAGE, layers=["1"], match=match)(real, fake)
    matching = FeatureMatching(net, IMAGE, layers=["1"], match=match, resize="area")
    _, distance = matching(real, fake)
    pooled = F.avg_pool2d(net[:2](real), 2)
    expected = STATISTICS[match](pooled, net[:2](fake), ranks=World())
    assert distance.total.item() == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(FeatureMatchingError, match="has shape"):  # another number of images is no size
        matching(real[:5], fake)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"match": "means"}, r"match must be one of 'sample', 'mean', .*, not 'means'"),
        ({"criterion": "L1"}, "criterion must be one of None, 'l1', 'l2', 'charbonnier', not 'L1'"),
        ({"balance": True}, "balance must be one of 'gradient', 'none', not True"),
        ({"resize": "bilinear"}, "resize must be one of None, 'area', not 'bilinear'"),
        ({"match": "coral", "criterion": "l1"}, "match 'coral' defines its own distance; leave criterion out"),
        ({"match": "mmd", "estimator": "running"}, "estimator 'running' is for match 'mean', not 'mmd'"),
        ({"estimator": "unbiased", "criterion": "l1"}, "estimator 'unbiased' is for criterion 'l2', not 'l1'"),
        ({"estimator": "running", "resize": "area"}, "estimator 'running' keeps a mean of one size"),
        ({"layers": "nowhere"}, "there is no layer 'nowhere'"),
        ({"layers": 17}, "there is no layer 17"),
        ({"layers": ["1", "4"], "layer_weights": [1.0]}, "has 1 weights for 2 layers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(settings, words):
    with pytest.raises(FeatureMatchingError, match=words) as error:
        FeatureMatching(plain(), IMAGE, **settings)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


# Several processes

SETTINGS = [
    *({"match": match} for match in STATISTICS),
    {"estimator": "unbiased"},
    {"estimator": "running"},
    {"match": "mmd", "kernel": "rbf"},
]


def one_step(settings: dict, part: slice, size: int) -> dict[str, torch.Tensor]:
    """Two steps of a loop of one's own on a slice of the batch, gradients averaged as DistributedDataParallel does."""
    net = nn.Sequential(*(m for m in plain() if not isinstance(m, nn.BatchNorm2d)))
    matching, found = FeatureMatching(net, IMAGE, layers=["0", "2"], weight=0.3, directions=8, **settings), {}
    weight = torch.full((1, 16, 16), 0.9, dtype=torch.float64, requires_grad=True)
    for step in range(2):
        fake = weight * noise(step + 3, 8)[part]
        logits, distance = matching(noise(step, 8)[part], fake, step)
        (gradient,) = torch.autograd.grad(matching.combine(F.softplus(-logits).mean(), distance, fake), weight)
        means = torch.cat([gradient.flatten(), distance.total.detach().view(1)])
        if size > 1:
            dist.all_reduce(means)
        found[f"gradient and distance {step}"] = means / size
    return found | {name: value.clone() for name, value in matching.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [one_step(settings, slice(4 * rank, 4 * rank + 4), 2) for settings in SETTINGS]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("place", range(len(SETTINGS)), ids=[str(settings) for settings in SETTINGS])
def test_two_processes_are_one_with_the_whole_batch(two_processes, place):
    one = one_step(SETTINGS[place], slice(0, 8), 1)
    for rank in two_processes:
        assert rank[place].keys() == one.keys()
        for name, value in one.items():
            assert torch.allclose(rank[place][name].double(), value.double(), rtol=1e-9, atol=1e-15), name
