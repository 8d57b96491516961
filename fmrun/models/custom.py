"""Nets of the user's own, named by `target = "package.module:Class"`.

A discriminator becomes one of fmrun's by walking it: its convolutions, linear layers and activations, in the order in
which a forward calls them, are its features. They are caught by hooks, placed before anything is compiled.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError, nearest
from ..trust import Target, admitted
from .base import Discriminator, Out
from .norm import hold_spectral

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd,)
WEIGHTED: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear, nn.Bilinear)
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    kind
    for name in nn.modules.activation.__all__
    if name != "MultiheadAttention" and isinstance(kind := getattr(nn.modules.activation, name), type)
)


def load_target(target: str, params: Mapping[str, Any], field: str, generator: torch.Generator) -> nn.Module:
    """The net that `target` ("package.module:Class", or a function that returns a net) makes of the keyword arguments
    `params`, with first weights from `generator`.

    Raises UserError, naming `field`, if this user has not allowed it (`trust`), if there is no such thing, or if it does
    not take these arguments.
    """
    module_name, _, name = target.partition(":")
    code = admitted(Target(field, target, params))
    code.make_importable()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(f"{field}.target: there is no module '{error.name}' in {code.said}") from None
        hint = "" if code.installed else "; only files that import statements name are found"
        raise UserError(f"{field}.target: importing '{module_name}' fails: {_said(error)}{hint}") from error
    except Exception as error:
        raise UserError(f"{field}.target: importing '{module_name}' fails: {_said(error)}") from error
    make = getattr(module, name, None)
    if make is None:
        classes = [k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, nn.Module)]
        raise UserError(f"{field}.target: '{module_name}' has no '{name}'{nearest(name, classes)}")
    if not callable(make) or (inspect.isclass(make) and not issubclass(make, nn.Module)):
        raise UserError(f"{field}.target: '{target}' is not a torch.nn.Module")
    _check_arguments(make, params, f"{field}.params: '{target}'")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            net = make(**params)
        except Exception as error:
            raise UserError(f"{field}.target: making '{target}' fails: {_said(error)}") from error
    if not isinstance(net, nn.Module):
        raise UserError(
            f"{field}.target: '{target}' makes something of type {type(net).__name__}, not a torch.nn.Module"
        )
    return net


@contextmanager
def expecting_old_code(config: Config) -> Iterator[None]:
    """Inside, weights are loaded into the nets that a checkpoint's config describes; UserError if they do not fit, as where a
    class of the user's own has changed."""
    try:
        yield
    except RuntimeError as error:
        targets = [net.target for net in (config.generator, config.discriminator) if net.target is not None]
        what = str(error).strip().splitlines()[-1].strip()
        if not targets:
            raise UserError(f"the checkpoint's weights do not fit the nets that its own config describes ({what})") from None
        raise UserError(
            f"the code of {' or '.join(targets)} no longer makes the net that was trained ({what}); put it back as it was"
        ) from None


def _said(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def _check_arguments(make: Any, params: Mapping[str, Any], what: str) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**params)
    except TypeError as error:
        shown = str(signature.replace(return_annotation=inspect.Signature.empty))
        raise UserError(f"{what} does not take what it is given ({error}); it takes {shown}") from None


def custom_generator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    examples: Sequence[tuple[Tensor, Sequence[int]]],
    field: str = "generator",
) -> nn.Module:
    """The user's own generator, as it is, once it is known to make of each of the `examples` (B, …), latents or images,
    images of the shape (B, C, H, W) beside it.

    Raises UserError if it does not.
    """
    net = load_target(target, params, field, generator)
    for example, shape in examples:
        with torch.no_grad():
            made = _try(copy.deepcopy(net), example, field, target)
        if not isinstance(made, Tensor) or tuple(made.shape) != tuple(shape):
            got = tuple(made.shape) if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(
                f"{field}.target: '{target}' makes {got} of {tuple(example.shape)}, and must make {tuple(shape)}"
            )
    return net


def custom_discriminator(
    target: str,
    params: Mapping[str, Any],
    generator: torch.Generator,
    image: tuple[int, int, int],
    field: str = "discriminator",
) -> nn.Module:
    """The user's own discriminator of images (C, H, W): as it is if it has the face of fmrun's, else walked.

    Raises UserError if it cannot be made, does not take such images, or gives no logits.
    """
    net = load_target(target, params, field, generator)
    return net if isinstance(net, Discriminator) else WalkedDiscriminator(net, image, field=field, name=target)


def _try(net: nn.Module, example: Tensor, field: str, name: str) -> Any:
    """What `net` gives for `example`, global random state left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return net(example)
        except Exception as error:
            raise UserError(
                f"{field}.target: '{name}' fails on an input of shape {tuple(example.shape)}: {_said(error)}"
            ) from error


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a discriminator returned: a tensor, the first of several, or under the name `logits`."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


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
        self.nodes: dict[str, Any] = {}
        self.versions: dict[str, int] = {}
        self.weighted: set[str] = set()
        self.convolutions: set[str] = set()
        self.calls: dict[str, int] = {}

    def catch(self, name: str, module: nn.Module, output: Any) -> None:
        count = self.calls[name] = self.calls.get(name, 0) + 1
        call = name if count == 1 else f"{name}#{count}"
        if not isinstance(output, Tensor):
            return
        if self.wanted is None:
            self.caught[call] = output
            self.nodes[call] = output.grad_fn
            self.versions[call] = output._version
            if isinstance(module, WEIGHTED):
                self.weighted.add(call)
            if isinstance(module, CONVOLUTIONS):
                self.convolutions.add(call)
        elif call in self.wanted:
            self.caught[call] = output.clone() if call in self.copied else output
            if self.stop and len(self.caught) == len(self.wanted):
                raise _Enough


class _Hook:
    """Forward hook of the module called `name`. A class, so that a deep copy of the net hooks into the copy."""

    def __init__(self, name: str, recorder: _Recorder):
        self.name, self.recorder = name, recorder

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recorder.active:
            self.recorder.catch(self.name, module, output)


class WalkedDiscriminator(nn.Module):
    """Any net from images (B, C, H, W) to logits of any shape, with the face of fmrun's discriminators.

    Features are the outputs of its convolutions, linear layers and activations before the head, by dotted name; what a
    module gives when called again is `name#2`, and so on. The head is what no further convolution or linear layer
    stands between and the logits. Activations in place are made to work out of place, and torch's spectral norms to
    move in the discriminator's update only. It is left uncompiled where the rest is compiled: hooks and early exits are
    not for a compiler.

    Args:
        net: the user's; may also return a tuple or a mapping, see `logits_of`.
        image: shape (C, H, W) of the images it is walked with.
        field: where the user named it, for messages.
        name: what the user named.
    """

    def __init__(self, net: nn.Module, image: tuple[int, int, int], *, field: str = "discriminator", name: str = ""):
        super().__init__()
        name = name or type(net).__name__
        hold_spectral(net)
        for module in net.modules():
            if isinstance(module, ACTIVATIONS) and getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.net = net
        self._recorder = _Recorder()
        for path, module in net.named_modules():
            if isinstance(module, WEIGHTED + ACTIVATIONS):
                module.register_forward_hook(_Hook(path or type(module).__name__.lower(), self._recorder))
        self.feature_names, self.auto, self._recorder.copied = self._walk(image, field, name)
        names = self.feature_names
        third = -(-len(names) // 3)
        parts = [part for part in (names[:third], names[third : 2 * third], names[2 * third :]) if part]
        self.groups = {
            "early": parts[0],
            "mid": parts[len(parts) // 2],
            "key": tuple(part[-1] for part in parts),
            "all": names,
        }

    def _walk(self, image: tuple[int, int, int], field: str, name: str) -> tuple[tuple[str, ...], str, frozenset[str]]:
        """Names of the features, the automatic one, and those written into later, from a forward of a copy."""
        twin = copy.deepcopy(self)
        recorder = twin._recorder
        weight = next(twin.parameters(), torch.empty(()))
        rng = torch.Generator().manual_seed(0)
        example = torch.rand(2, *image, generator=rng).mul_(2).sub_(1).to(weight.device, weight.dtype).requires_grad_()
        recorder.active = True
        with torch.enable_grad():
            logits = logits_of(_try(twin.net, example, field, name))
        if logits is None:
            raise UserError(
                f"{field}.target: '{name}' returns no logits; it must return a tensor, or logits first in a tuple"
            )
        behind = _behind(logits, {recorder.nodes[call] for call in recorder.weighted})
        names = [call for call in recorder.caught if recorder.nodes[call] is None or recorder.nodes[call] not in behind]
        if logits.grad_fn is None and recorder.weighted:  # no graph to follow: the last layer is the head
            calls = list(recorder.caught)
            names = calls[: max(i for i, call in enumerate(calls) if call in recorder.weighted)]
        if not names:
            raise UserError(
                f"{field}.target: '{name}' has no convolution, linear layer or activation before its last one, so "
                "there are no features to match"
            )
        convolutions = [call for call in names if call in recorder.convolutions]
        choice = convolutions or [call for call in names if call in recorder.weighted] or names
        written = frozenset(call for call in names if recorder.caught[call]._version != recorder.versions[call])
        return tuple(names), choice[-1], written

    def __deepcopy__(self, memo: dict[int, Any]) -> WalkedDiscriminator:
        """Weights that a hook computes before each forward, as torch's old norms do, cannot be copied with a graph."""
        for module in self.modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(module, key, value.detach())
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(self, image: Tensor, taps: tuple[str, ...] = (), logits: bool = True) -> Out:
        if not taps:
            return Out(self._judged(self.net(image)) if logits else None)
        recorder = self._recorder
        recorder.begin()
        recorder.active, recorder.wanted, recorder.stop = True, frozenset(taps), not logits
        judged = None
        try:
            output = self.net(image)
            judged = self._judged(output) if logits else None
        except _Enough:
            pass
        finally:
            caught, recorder.active = recorder.caught, False
            recorder.begin()
        missing = [name for name in taps if name not in caught]
        if missing:
            raise UserError(
                f"discriminator: this forward did not come by layer '{missing[0]}', which it did when the net was "
                "walked; leave it out of feature_matching.layers"
            )
        return Out(judged, {name: caught[name] for name in self.feature_names if name in caught})

    @staticmethod
    def _judged(output: Any) -> Tensor:
        found = logits_of(output)
        assert found is not None
        return found


def _behind(logits: Tensor, layers: set[Any]) -> set[Any]:
    """Nodes of the graph between `logits` and the first of `layers` on every way back, those included."""
    seen: set[Any] = set()
    waiting = [logits.grad_fn] if logits.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in layers:
            waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return seen
