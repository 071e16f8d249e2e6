"""How strongly a map contracts at a point: the norm of its Jacobian (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oms_core.errors import InputError
from oms_core.search import Map

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4  # relative growth of the norm at which a picture is done
MOST = 50  # products with the Jacobian at a point
Product = Callable[["Tensor"], "Tensor"]  # from (B, D) to (B, D) float32


@dataclass(frozen=True)
class Norm:
    """The Jacobian norm of a map at a point, for each picture of a batch.

    Attributes:
        value: the largest singular value, (B,) float32; approached from below, so that where two lie close
            together it may be the second.
        direction: the noise of length 1 that is stretched by it, (B, D) float32.
        products: how often the Jacobian was multiplied with a vector, and its transpose once less.
    """

    value: Tensor
    direction: Tensor
    products: int


def jacobian_norm(f: Map, eps: Tensor, start: Tensor | None = None) -> Norm:
    """||df/deps|| (Eq. 8), for each picture at once.

    Power iteration with J^T J that keeps every vector it has seen and takes the best of their span (Golub & Kahan,
    1965): the largest singular values of a denoiser lie so close together that the last vector alone would need
    several times as many products. A picture is done when its norm grows by less than `TOLERANCE`, and from then
    on left as it is, so that its norm does not depend on the rest of the batch.

    Args:
        f: the map; it must treat each picture of a batch by itself.
        eps: where, (B, C, H, W).
        start: a direction near the one that is sought, (B, D); by default the same drawn one for every picture.

    Raises:
        InputError: the Jacobian is not finite.
    """
    import torch

    forward, backward = products(f, eps)
    basis, images = [drawn(eps) if start is None else start], []
    value, direction = torch.zeros_like(basis[0][:, 0]), basis[0]
    done = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(min(MOST, direction.shape[1])):
        images.append(finite(forward(basis[-1])))
        longest, best = best_of(basis, images)
        grown = longest - value
        value, direction = torch.where(done, value, longest), torch.where(done[:, None], direction, best)
        done |= grown <= TOLERANCE * value
        if done.all():
            break
        basis.append(new_direction(finite(backward(images[-1])), basis))
    return Norm(value, direction, len(images))


def products(f: Map, eps: Tensor) -> tuple[Product, Product]:
    """v -> J v and u -> J^T u for the Jacobian J of f at eps, picture by picture.

    J v is the derivative of the linear map u -> J^T u: some layers have no forward-mode derivative, and the plain
    kernel of attention is the only one that can be differentiated twice.
    """
    import torch
    from torch.func import vjp
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def flat(product: Callable[[Tensor], tuple[Tensor, ...]]) -> Product:
        return lambda vector: product(vector.view_as(eps).to(eps.dtype))[0].flatten(1).float()

    with sdpa_kernel(SDPBackend.MATH):
        answer, backward = vjp(f, eps)
        _, forward = vjp(lambda u: backward(u)[0], torch.zeros_like(answer))
    return flat(forward), flat(backward)


def drawn(eps: Tensor) -> Tensor:
    """A direction of length 1, the same for every picture, (B, D) float32."""
    import torch

    direction = torch.randn(eps[0].numel(), generator=torch.Generator().manual_seed(0))
    return (direction / direction.norm()).to(eps.device).repeat(len(eps), 1)


def best_of(basis: list[Tensor], images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By how much, (B,), and at which vector, (B, D), J stretches most in the span of a basis, from its images."""
    import torch

    _, values, mixtures = torch.linalg.svd(torch.stack(images, dim=2), full_matrices=False)
    return values[:, 0], torch.einsum("kbd,bk->bd", torch.stack(basis), mixtures[:, 0])


def new_direction(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """What of a vector is orthogonal to a basis, at length 1, (B, D); zero where nothing is left."""
    import torch

    for _ in range(2):  # once is not enough in floating point
        for known in basis:
            vector = vector - (vector * known).sum(dim=1, keepdim=True) * known
        vector = torch.nn.functional.normalize(vector)
    return vector


def finite(vector: Tensor) -> Tensor:
    """The vector itself.

    Raises:
        InputError: it is not finite.
    """
    if vector.isfinite().all():
        return vector
    raise InputError("The derivative of the model is not finite here, so it has no norm; try float32 and fewer steps.")
