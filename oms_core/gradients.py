"""The gradient of each picture's own loss, for about the price of one backward pass of the batch.

A backward pass adds up the gradients of all pictures. But the gradient by a layer's weight is a short product of
what the layer took, a, and of the gradient by what it gave, g, and these two are still apart (Goodfellow, 2015):

| layer       | gradient by its weight, for one picture                       |
|-------------|---------------------------------------------------------------|
| linear      | sum_p g_p a_p^T over the positions p                          |
| convolution | the same for each place s of the kernel, with a_{p+s}         |
| embedding   | the same, with a one in a_p where the index points            |
| norm        | sum_p g_p x_p, where x is the input after normalisation       |

Only its length is wanted, whose square is also sum_pq (a_p . a_q) (g_p . g_q); the product with fewer
multiplications is taken. A layer that is called several times has the positions of all its calls. Any other
parameter is copied for each picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

CHUNK = 2**19  # numbers that a product takes at once, about; those of one picture may be more
SCALE = 2.0**8  # of a loss on its way back, so that half precision does not lose small gradients; taken out again


def gradient_norms(network: nn.Module, count: int, losses_of: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The L2 norm of the gradient of each picture's loss by each parameter, in one forward pass.

    The network is left as it was; its parameters need not ask for gradients.

    Args:
        network: it treats each picture by itself and has the pictures along the first axis of everything that meets
            a parameter; no two of its layers share a parameter.
        count: how many pictures, B.
        losses_of: asks the network, as often as it likes, for one or several losses, each (B,).

    Returns:
        For each loss the norms, (B, K) float32, in the order of `network.parameters()`.

    Raises:
        RuntimeError: something that meets a parameter does not have the pictures along its first axis.
    """
    parameters = [*network.parameters()]
    with watched(network, count) as watch, torch.enable_grad():
        losses = losses_of()
        found = [watch.norms(loss, again=loss is not losses[-1]) for loss in losses]
    zero = torch.zeros(count, device=parameters[0].device)  # where a loss does not depend on a parameter
    return [torch.stack([norms.get(id(one), zero) for one in parameters], dim=1) for norms in found]


@dataclass
class Watch:
    """What has to be remembered of a forward pass.

    Attributes:
        count: B.
        calls: of the layers in `RULES`: what a layer took, and where the gradient by what it gave will arrive.
        copies: of all other parameters, by identity, each (B, ...).
    """

    count: int
    calls: list[tuple[nn.Module, Tensor, GradientEdge]] = field(default_factory=list)
    copies: dict[int, Tensor] = field(default_factory=dict)

    def note(self, layer: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
        """A forward hook. No parameter asks for a gradient, so the graph begins at what the first layers give."""
        if not given.requires_grad:
            given.requires_grad_()
        self.calls.append((layer, taken[0].detach(), get_gradient_edge(given)))

    def copied(self, parameter: nn.Parameter) -> Copied:
        """A parameter that is copied for each picture."""
        copies = parameter.detach().expand(self.count, *parameter.shape).requires_grad_()
        self.copies[id(parameter)] = copies
        return as_copied(parameter.detach(), copies)

    def norms(self, loss: Tensor, again: bool) -> dict[int, Tensor]:
        """For each parameter that a loss depends on, by identity, (B,); `again` keeps the graph for another loss."""
        ends = [*(edge for *_, edge in self.calls), *self.copies.values()]
        found = torch.autograd.grad(SCALE * loss.sum(), ends, retain_graph=again, allow_unused=True)
        calls = defaultdict(list)
        for (layer, taken, _), given in zip(self.calls, found[: len(self.calls)], strict=True):
            if given is not None:
                calls[layer].append((apart(taken, self.count), apart(given, self.count)))
        norms = {name: norm for layer in calls for name, norm in norms_of(layer, calls[layer]).items()}
        for name, copies in zip(self.copies, found[len(self.calls) :], strict=True):
            if copies is not None:
                norms[name] = length(copies.float())
        return {name: norm / SCALE for name, norm in norms.items()}


@contextmanager
def watched(network: nn.Module, count: int) -> Iterator[Watch]:
    """Watch a network's layers, and put everything back afterwards."""
    watch = Watch(count)
    with ExitStack() as undo:
        for parameter in network.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in network.modules():
            if known(module):
                undo.callback(module.register_forward_hook(watch.note).remove)
                continue
            for name, parameter in [*module.named_parameters(recurse=False)]:
                undo.callback(module._parameters.__setitem__, name, parameter)
                module._parameters[name] = watch.copied(parameter)
        yield watch


def apart(x: Tensor, count: int) -> Tensor:
    """(B k, ...) as (B, k, ...)."""
    return x.unflatten(0, (count, -1))


# Layers


def known(module: nn.Module) -> bool:
    """Whether a module is a layer whose gradient is one of the products above."""
    if getattr(module, "weight", None) is None:
        return False
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) in RULES


def norms_of(layer: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """The norms for a layer's parameters, by identity, (B,); what it took and g of each call are (B, k, ...)."""
    a, g = (torch.cat(parts, dim=1) if len(calls) > 1 else parts[0] for parts in zip(*calls, strict=True))
    positions = g[0].numel() // len(layer.weight)
    size = max(1, CHUNK // (a[0].numel() + g[0].numel() + min(positions**2, layer.weight.numel())))
    chunks = zip(a.split(size), g.split(size), strict=True)
    found = zip(*(RULES[type(layer)](layer, a, g.float()) for a, g in chunks), strict=True)
    named = zip(layer.parameters(recurse=False), found, strict=False)  # a rule names a bias that may not be there
    return {id(parameter): torch.cat(parts) for parameter, parts in named}


def linear(layer: nn.Linear, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """For weight and bias, from a (B, k, ..., inputs) and g (B, k, ..., outputs)."""
    return weighted(a.flatten(1, -2), g.flatten(1, -2))


def convolution(layer: nn.Conv2d, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """For weight and bias, from a (B, k, C, H, W) and g (B, k, O, h, w).

    A picture is read as one line, row after row, so that a place of the kernel is a shift along it.
    """
    (down, across), (rows, columns), (below, beside) = layer.padding, layer.kernel_size, layer.dilation
    a = F.pad(a, (across, across, down, down))
    width = a.shape[-1]
    shifts = [i * below * width + j * beside for i in range(rows) for j in range(columns)]
    return weighted(line(a), line(at_corners(g, a.shape[-2:], layer.stride)), shifts)


def at_corners(g: Tensor, size: Sequence[int], stride: tuple[int, int]) -> Tensor:
    """g (..., h, w) where each patch begins in the padded picture, with zeros between, (..., *size)."""
    (h, w), (down, across) = g.shape[-2:], stride
    corners = g.new_zeros(*g.shape[:-2], *size)
    corners[..., : h * down : down, : w * across : across] = g
    return corners


def line(x: Tensor) -> Tensor:
    """(B, k, C, H, W) as (B, k H W, C)."""
    return x.movedim(2, 1).flatten(2).mT


def weighted(a: Tensor, g: Tensor, shifts: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
    """The norms for weight and bias, from a (B, P, inputs) and g (B, P, outputs)."""
    return product(a.float(), g, shifts), length(g.sum(dim=1))


def product(a: Tensor, g: Tensor, shifts: Sequence[int]) -> Tensor:
    """The norm of sum_p g_p a_{p+s}^T over all shifts s together, (B,); g is zero where p + s leaves the line."""
    positions, inputs, outputs = a.shape[1] - shifts[-1], a.shape[2], g.shape[2]
    shifted, g = [slice(s, s + positions) for s in shifts], g[:, :positions]
    if positions * (inputs + outputs + len(shifts)) < len(shifts) * inputs * outputs:
        every = a @ a.mT
        squares = sum(every[:, s, s] for s in shifted) * (g @ g.mT)
        return root(squares.sum(dim=(1, 2)))
    return root(sum((g.mT @ a[:, s]).square().sum(dim=(1, 2)) for s in shifted))


def group_norm(layer: nn.GroupNorm, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """For weight and bias, from a and g (B, k, C, ...)."""
    x = F.group_norm(a.float().flatten(0, 1), layer.num_groups, eps=layer.eps).view_as(g)
    others = [1, *range(3, g.dim())]
    return length((g * x).sum(others)), length(g.sum(others))


def layer_norm(layer: nn.LayerNorm, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """For weight and bias, from a and g (B, k, ..., *shape)."""
    x = F.layer_norm(a.float(), layer.normalized_shape, eps=layer.eps)
    others = [*range(1, g.dim() - len(layer.normalized_shape))]
    return length((g * x).sum(others)), length(g.sum(others))


def embedding(layer: nn.Embedding, a: Tensor, g: Tensor) -> tuple[Tensor]:
    """For the weight, from indices a (B, k, ...) and g (B, k, ..., width)."""
    a, g = a.flatten(1), g.flatten(1, -2)
    same = a[:, :, None] == a[:, None]
    if layer.padding_idx is not None:
        same &= (a != layer.padding_idx)[:, None]
    return (root((same * (g @ g.mT)).sum(dim=(1, 2))),)


def length(x: Tensor) -> Tensor:
    """The L2 norm for each picture, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def root(squares: Tensor) -> Tensor:
    """The square root of sums that may have been rounded below zero."""
    return squares.clamp_min(0).sqrt()


RULES = {
    nn.Linear: linear,
    nn.Conv2d: convolution,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
}


# Parameters outside these layers


class Copied(Tensor):
    """A parameter of which each picture has a copy; what takes it is done for each picture by itself.

    Attributes:
        copies: (B, ...).
    """

    copies: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Of pictures and copies, pictures, (B k, ...); of copies alone, copies; of their shape or type, the same."""
        leaves, tree = tree_flatten((args, kwargs or {}))
        if any(isinstance(leaf, Tensor) and not isinstance(leaf, cls) for leaf in leaves):
            return tree_map(lambda x: x.flatten(0, 1), each(function, leaves, tree))
        plain = super().__torch_function__(function, types, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(plain)):
            return plain
        return tree_map(as_copied, plain, each(function, leaves, tree))


def as_copied(one: Tensor, copies: Tensor) -> Copied:
    """A tensor and its copies (B, ...)."""
    copied = one.as_subclass(Copied)
    copied.copies = copies
    return copied


def each(function: Callable[..., Any], leaves: list[Any], tree: TreeSpec) -> Any:
    """A function of copies and pictures, for each picture by itself; every tensor of its result is (B, ...)."""
    count = len(next(leaf.copies for leaf in leaves if isinstance(leaf, Copied)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def one(*tensors: Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(leaves)], tree)
        return function(*args, **kwargs)

    tensors = [leaves[place] for place in places]
    return torch.vmap(one)(*(x.copies if isinstance(x, Copied) else apart(x, count) for x in tensors))
