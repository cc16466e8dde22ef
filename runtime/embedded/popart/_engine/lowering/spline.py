"""SplineBasis and SplineWeighting of ai.graphcore (SplineCNN, Fey et al., 2018)."""
from __future__ import annotations

import itertools

import torch

from ..registry import lowers
from .common import refuse

# B-spline basis of degree d at fraction f of its knot span: the d + 1 products that are not zero, from the first knot on
_BASIS = {
    1: (lambda f: 1 - f, lambda f: f),
    2: (lambda f: 0.5 * f * f - f + 0.5, lambda f: -f * f + f + 0.5, lambda f: 0.5 * f * f),
    3: (
        lambda f: (1 - f) ** 3 / 6, lambda f: (3 * f**3 - 6 * f**2 + 4) / 6,
        lambda f: (-3 * f**3 + 3 * f**2 + 3 * f + 1) / 6, lambda f: f**3 / 6,
    ),
}  # fmt: skip


@lowers("ai.graphcore", "SplineBasis", 1)
def spline_basis(op, pseudo, kernel_size, is_open_spline):
    """pseudo [E,D] in [0,1], kernel_size int [D], is_open_spline [D] -> basis [E,S], weight_index int32 [E,S].

    S = (degree + 1) ** D: every combination of one basis function a dimension, the first dimension fastest. The index
    runs over the product of the kernel sizes, the first dimension fastest.
    """
    degree = op.attr("degree")
    if degree not in _BASIS:
        raise refuse(op, f"degree {degree}; 1, 2 and 3 are supported")
    size, is_open = kernel_size.long(), is_open_spline.long()
    scaled = pseudo.float() * (size - degree * is_open)
    first = scaled.floor()
    fraction = scaled - first
    functions = torch.stack([function(fraction) for function in _BASIS[degree]])  # [degree+1, E, D]
    strides = torch.cat([torch.ones(1, dtype=torch.long), torch.cumprod(size, 0)[:-1]])
    basis, index = [], []
    for powers in itertools.product(range(degree + 1), repeat=pseudo.shape[1]):
        powers = powers[::-1]  # the first dimension fastest
        product, offset = 1.0, 0
        for d, k in enumerate(powers):
            product = product * functions[k, :, d]
            offset = offset + torch.remainder(first[:, d].long() + k, size[d]) * strides[d]
        basis.append(product)
        index.append(offset)
    return torch.stack(basis, dim=1).to(pseudo.dtype), torch.stack(index, dim=1).to(torch.int32)


@lowers("ai.graphcore", "SplineWeighting", 1)
def spline_weighting(op, x, weight, basis, weight_index):
    """x [E,I], weight [K,I,O], basis and weight_index [E,S] -> [E,O]: sum over s of basis * x @ weight[index]."""
    picked = weight.float().index_select(0, weight_index.reshape(-1).long()).reshape(*weight_index.shape, *weight.shape[1:])
    return torch.einsum("ei,esio,es->eo", x.float(), picked, basis.float()).to(x.dtype)
