"""Any net from images to logits, with the face of fmrun's discriminators.

What its modules give is caught by hooks, placed before anything is compiled. A forward and its graph, once, tell which
of what comes back are the logits, which calls they depend on, and where the head begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize

from .discriminator import DiscriminatorOutput, Logits
from .errors import FeatureMatchingError

Output = TypeVar("Output")

WEIGHTED: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    kind
    for name in nn.modules.activation.__all__
    if name != "MultiheadAttention" and isinstance(kind := getattr(nn.modules.activation, name), type)
)

PRODUCTS = ("Convolution", "MkldnnConvolution", "Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "MkldnnLinear", "Trilinear")
"""Operations with weights, as the graph names them: convolutions and matrix products, by modules or functions."""

SHAPING = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Permute",
    "Transpose",
    "Mean",
    "Select",
    "Clone",
    "T",
)
"""Operations that leave the range of what they are given."""

LOGITS = (
    *("logits", "logit", "validity", "adv", "prediction", "predictions", "pred", "preds"),
    *("output", "outputs", "out", "score", "scores"),
)
"""Names under which a mapping may hold logits."""


def detach_weights(net: nn.Module) -> None:
    """Weights that a hook computes before each forward, as torch's older norms do, cannot be copied with a graph."""
    for module in net.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, key, value.detach())


def attempt(net: Callable[[Tensor], Output], example: Tensor, what: str) -> Output:
    """What `net` gives for `example`, global random state left alone; FeatureMatchingError, which begins with `what`, if it fails."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return net(example)
        except Exception as error:
            raise FeatureMatchingError(
                f"{what} fails on an input of shape {tuple(example.shape)}: {said(error)}"
            ) from error


def said(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def materialise(net: nn.Module, example: Tensor, what: str) -> None:
    """Give lazily initialised modules their first weights, by one forward."""
    if any(nn.parameter.is_lazy(p) for p in (*net.parameters(), *net.buffers())):
        with torch.no_grad():
            attempt(net, example, what)


def example_of(net: nn.Module, image: tuple[int, int, int], what: str) -> Tensor:
    """Two images (C, H, W) on the net's device and of its type; a net with lazy modules has its weights afterwards."""
    weight = next(net.parameters(), torch.empty(()))
    example = torch.rand(2, *image, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    materialise(net, example, what)
    return example.to(weight.device, weight.dtype if weight.is_floating_point() else example.dtype)


def out_of_place(net: nn.Module) -> None:
    """Make activations leave alone what they are given: it may be a feature."""
    for module in net.modules():
        if isinstance(module, ACTIVATIONS) and getattr(module, "inplace", False):
            vars(module)["inplace"] = False


# ---- what comes back

Path = tuple[str | int, ...]


def entries(output: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of numbers in what a net returned, with the way to it."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim:
            yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from entries(value, (*path, key))
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from entries(value, (*path, i))


def at(output: object, path: Path) -> Tensor:
    for step in path:
        if isinstance(output, Mapping):
            output = output[step]
        else:
            assert isinstance(output, tuple | list)
            assert isinstance(step, int)
            output = output[step]
    assert isinstance(output, Tensor)
    return output


def _chain(node: Node | None, names: Sequence[str]) -> bool:
    return node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in names


def ancestors(nodes: Sequence[Node | None], stop: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """Nodes of the graph that these follow from, and these; nothing beyond one at which to `stop`."""
    seen: set[Node] = set()
    waiting = [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return seen


def logit_paths(output: object, what: str, batch: int) -> tuple[Path, ...]:
    """Where the logits of a batch are in what a discriminator returned: the entry that the others feed into, or several of
    one channel, predictions at several scales; each with a row for every image. FeatureMatchingError, which says what came back,
    where that is not clear."""
    candidates = [(path, tensor) for path, tensor in entries(output) if tensor.shape[0] == batch]
    if any(tensor.requires_grad for _, tensor in candidates):  # what was detached are features
        candidates = [(path, tensor) for path, tensor in candidates if tensor.requires_grad]
    if isinstance(output, Mapping):
        named = [name for name in LOGITS if any(path[0] == name for path, _ in candidates)]
        if named:
            candidates = [(path, tensor) for path, tensor in candidates if path[0] == named[0]]
    nodes = [tensor.grad_fn for _, tensor in candidates]
    behind = [ancestors([node]) for node in nodes]
    last: dict[Node | int, tuple[Path, Tensor]] = {}
    for i, (path, tensor) in enumerate(candidates):
        if all(nodes[i] not in behind[k] or nodes[k] is nodes[i] for k in range(len(candidates))):
            node = nodes[i]
            last.setdefault(i if node is None else node, (path, tensor))
    sinks = list(last.values())
    for k, (_, tensor) in enumerate(sinks):  # a probability beside the logits that it is made of
        if _chain(tensor.grad_fn, ("Sigmoid",)):
            assert tensor.grad_fn is not None
            inner = tensor.grad_fn.next_functions[0][0]
            sinks[k] = next((entry for entry, node in zip(candidates, nodes, strict=True) if node is inner), sinks[k])
    single = all(tensor.ndim == 1 or tensor.shape[1] == 1 for _, tensor in sinks)
    if len(sinks) == 1 or (sinks and single):
        return tuple(path for path, _ in sinks)
    shown = ", ".join(f"{_written(path)} {tuple(tensor.shape)}" for path, tensor in entries(output))
    raise FeatureMatchingError(
        f"{what} returns {shown or f'a {type(output).__name__} without logits'} for {batch} images, and it is not clear which "
        "are the logits: return them alone, or as {'logits': …}, with a row for every image"
    )


def _written(path: Path) -> str:
    return "".join(f"[{step!r}]" for step in path)


# ---- what is caught on the way


class _Enough(BaseException):
    """All that was asked for has been computed. No `except Exception` on the way may catch it."""


class _Recorder:
    """What the hooks of one net share: which calls are wanted, and what was caught."""

    def __init__(self) -> None:
        self.active = False
        self.wanted: frozenset[str] | None = None
        """None: all of them."""
        self.stop = False
        self.copied: frozenset[str] = frozenset()
        """Features that the net writes into later on, so that they must be copied."""
        self.begin()

    def begin(self) -> None:
        self.caught: dict[str, Tensor] = {}
        self.nodes: dict[str, Node | None] = {}
        self.versions: dict[str, int] = {}
        self.modules: dict[str, nn.Module] = {}
        self.calls: dict[str, int] = {}

    def catch(self, name: str, module: nn.Module, output: object) -> None:
        count = self.calls[name] = self.calls.get(name, 0) + 1
        call = name if count == 1 else f"{name}#{count}"
        if isinstance(output, tuple | list) and output:  # attention gives its weights too
            output = output[0]
        if not isinstance(output, Tensor):
            return
        if self.wanted is None:
            self.caught[call] = output
            self.nodes[call] = output.grad_fn
            self.versions[call] = output._version
            self.modules[call] = module
        elif call in self.wanted:
            self.caught[call] = output.clone() if call in self.copied else output
            if self.stop and len(self.caught) == len(self.wanted):
                raise _Enough


class _Hook:
    """Forward hook of the module called `name`. A class, so that a deep copy of the net hooks into the copy."""

    def __init__(self, name: str, recorder: _Recorder):
        self.name, self.recorder = name, recorder

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.recorder.active:
            self.recorder.catch(self.name, module, output)


class WalkedDiscriminator(nn.Module):
    """Any net from images (B, C, H, W) to logits of any shape, with the face of fmrun's discriminators.

    Features are what modules give on the way to the logits, before the head, by dotted name; what a module gives when
    called again is `name#2`, and so on. The head is what no further convolution or matrix product stands between and the
    logits. Listed are convolutions, linear layers, activations, blocks (modules with parts) and modules of the user's own;
    what else there is (norms, pooling) can be named. Activations in place are made to work out of place. Leave it
    uncompiled where the rest is compiled: hooks and early exits are not for a compiler.

    Args:
        net: the user's; see `logit_paths` for what it may return.
        image: shape (C, H, W) of the images it is walked with.
        what: what it is called in messages.
    """

    def __init__(self, net: nn.Module, image: tuple[int, int, int], what: str = "the discriminator"):
        super().__init__()
        example = example_of(net, image, what)
        out_of_place(net)
        self.net = net
        self._recorder = _Recorder()
        for path, module in net.named_modules():
            parts = [m for m in module.children() if not isinstance(m, parametrize.ParametrizationList)]
            if "parametrizations" not in path and (path or not parts):
                module.register_forward_hook(_Hook(path or type(module).__name__.lower(), self._recorder))
        self._walk(example, what)

    def _walk(self, example: Tensor, what: str) -> None:
        """Set the names of features and where logits are, from a forward of a copy."""
        twin = copy.deepcopy(self)
        recorder = twin._recorder
        leaf = example.clone().requires_grad_()
        recorder.active = True
        with torch.enable_grad():
            output = attempt(twin.net, leaf, what)
        self.paths = logit_paths(output, what, len(example))
        logits = [at(output, path).grad_fn for path in self.paths]
        sigmoid = [self._before_shaping(node) for node in logits]
        self.ends_in_sigmoid = all(_chain(node, ("Sigmoid",)) for node in sigmoid)
        calls, ways = list(recorder.caught), [ancestors([node]) for node in logits]
        head = ancestors(logits, stop=lambda node: _chain(node, PRODUCTS))
        followers = _descendants(leaf, set().union(*ways))
        self.calls = tuple(c for c in calls if recorder.nodes[c] in followers and recorder.nodes[c] not in head)
        self._name(recorder, ways)
        if not self.feature_names:
            raise FeatureMatchingError(
                f"{what} has no module before its head whose output could be matched; make modules of its parts, for a "
                "feature is what a module gives"
            )
        recorder.active = False

    @staticmethod
    def _before_shaping(node: Node | None) -> Node | None:
        while node is not None and _chain(node, SHAPING):
            node = node.next_functions[0][0]
        return node

    def _name(self, recorder: _Recorder, ways: Sequence[set[Node]]) -> None:
        """Which calls are listed, and the groups they form; `ways`: the nodes that each of the logits follows from."""
        listed: list[str] = []
        blocks: list[str] = []
        self.aliases: dict[str, str] = {}
        """A block that gives what its last part gives, by the name of that."""
        for call in self.calls:
            module, node = recorder.modules[call], recorder.nodes[call]
            twin = next((other for other in listed if node is not None and recorder.nodes[other] is node), None)
            block = any(not isinstance(part, parametrize.ParametrizationList) for part in module.children())
            if twin is not None:
                self.aliases[call] = twin
            elif (
                block or isinstance(module, WEIGHTED + ACTIVATIONS) or not type(module).__module__.startswith("torch.")
            ):
                listed.append(call)
                if block:
                    blocks.append(call)
        whole = [b for b in blocks if all(c == b or _base(c).startswith(f"{_base(b)}.") for c in listed)]
        # one that holds all others is the net itself
        blocks = [b for b in blocks if b not in whole or len(listed) == 1]
        outer = [c for c in listed if not any(_base(c).startswith(f"{_base(block)}.") for block in blocks)]
        sides = {
            c: (recorder.caught[c].shape[2:], *(recorder.nodes[c] in way for way in ways))  # of each scale its own
            for c in outer
            if recorder.caught[c].ndim == 4
        }
        ends = tuple({side: c for c, side in sides.items()}.values())  # the last of each resolution
        parts = thirds(listed)
        self.feature_names = names = tuple(listed)
        self.groups = {
            "early": tuple(parts[0]) if parts else (),
            "mid": tuple(parts[len(parts) // 2]) if parts else (),
            "key": ends if len(ends) > 1 else tuple(part[-1] for part in thirds(outer)),
            "all": names,
        }
        choice = [c for c in outer if c in blocks or isinstance(recorder.modules[c], nn.modules.conv._ConvNd)]
        choice = choice or [c for c in listed if isinstance(recorder.modules[c], WEIGHTED)] or listed
        self.auto = choice[-1] if choice else ""
        self._recorder.copied = frozenset(
            call for call in self.calls if recorder.caught[call]._version != recorder.versions[call]
        )

    def __deepcopy__(self, memo: dict[int, object]) -> WalkedDiscriminator:
        detach_weights(self)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(self, image: Tensor, layers: tuple[str, ...] = (), logits: bool = True) -> DiscriminatorOutput:
        if not layers:
            return DiscriminatorOutput(self._logits(self.net(image)) if logits else None)
        recorder = self._recorder
        recorder.begin()
        recorder.active, recorder.wanted, recorder.stop = True, frozenset(layers), not logits
        judged = None
        try:
            output = self.net(image)
            judged = self._logits(output) if logits else None
        except _Enough:
            pass
        finally:
            caught, recorder.active = recorder.caught, False
            recorder.begin()
        missing = [name for name in layers if name not in caught]
        if missing:
            raise FeatureMatchingError(
                f"discriminator: this forward did not come by layer '{missing[0]}', which it did when the net was "
                "walked; leave it out of feature_matching.layers"
            )
        return DiscriminatorOutput(judged, {name: caught[name] for name in self.calls if name in caught})

    def _logits(self, output: object) -> Logits:
        logits = tuple(at(output, path) for path in self.paths)
        return logits[0] if len(logits) == 1 else logits


def thirds(names: Sequence[str]) -> list[Sequence[str]]:
    third = -(-len(names) // 3)
    return [part for part in (names[:third], names[third : 2 * third], names[2 * third :]) if part]


def _base(call: str) -> str:
    return call.partition("#")[0]


def _descendants(leaf: Tensor, nodes: set[Node]) -> set[Node]:
    """Those of the nodes that `leaf` leads to."""
    later: dict[Node, list[Node]] = {}
    starts = []
    for node in nodes:
        for earlier, _ in node.next_functions:
            if earlier is not None:
                later.setdefault(earlier, []).append(node)
        if getattr(node, "variable", None) is leaf:
            starts.append(node)
    seen: set[Node] = set()
    while starts:
        node = starts.pop()
        if node not in seen:
            seen.add(node)
            starts += later.get(node, ())
    return seen
