"""Runs the fused element-wise Triton kernels in the interpreter; writes errors against formulas in fp64 as JSON.

Usage: TRITON_INTERPRET=1 fused_interpreter_worker.py RESULT.json. Buffers from ``torch.empty`` and its kin start as
NaN, so an element that is read without having been written, or never written, shows in the numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lcl_kernels import triton_fused
from torch import Tensor

OPS = torch.ops.lcl
DROPOUT = 0.3


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs).fill_(float("nan"))

    return empty


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-9))


def uint64_mix(x: int) -> int:
    """splitmix64 on Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def drawn(row_keys: Tensor, width: int) -> Tensor:
    """[t, h] which elements dropout keeps, from the definition, one number at a time."""
    threshold = round(DROPOUT * 65536)

    def kept(key: int, column: int) -> bool:
        draw = uint64_mix((key + (column // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64)
        return (draw >> 16 * (column % 4)) % 65536 >= threshold

    return torch.tensor([[kept(key, c) for c in range(width)] for key in row_keys.tolist()])


def residual_case(rows: int, width: int, dtype: torch.dtype, mask: str, gain: bool, bias: bool, norm: bool) -> Any:
    """Forward and backward of one residual branch; the exact mask of a branch of ones is compared too."""
    names = ("residual", "branch", "bias", "gain", "weight", "shift")
    shapes = ((rows, width),) * 2 + ((width,),) * 4
    x = {n: normal(*s, dtype=dtype, seed=i) for i, (n, s) in enumerate(zip(names, shapes, strict=True))}
    for name, there in (("bias", bias), ("gain", gain), ("weight", norm), ("shift", norm)):
        if not there:
            del x[name]
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(9))
    row_scale = torch.tensor([1.25, 0.0, 1.25]) if mask == "rows" else None
    row_keys = keys if mask == "elements" else None
    scale = torch.ones(rows, width, dtype=torch.float64)
    if row_scale is not None:
        scale *= row_scale.repeat_interleave(rows // 3)[:, None]
    if row_keys is not None:
        scale *= drawn(row_keys, width) * (65536 / (65536 - round(DROPOUT * 65536)))
    masks = (row_scale, row_keys, DROPOUT)
    out = OPS.residual_branch(
        x["branch"], x.get("bias"), x.get("gain"), x["residual"], x.get("weight"), x.get("shift"), 1e-5, *masks
    )
    g_sum, g_normed = (normal(rows, width, dtype=dtype, seed=s) for s in (7, 8))
    kept = (out[0], *out[2:]) if norm else (None, None, None)
    gradients = OPS.residual_branch_backward(
        g_sum,
        g_normed if norm else None,
        *kept,
        x["branch"] if gain else None,
        x.get("bias"),
        x.get("gain"),
        x.get("weight"),
        *masks,
    )
    leaves = {name: value.double().requires_grad_() for name, value in x.items()}
    branch = leaves["branch"] + leaves.get("bias", 0.0)
    total = leaves["residual"] + branch * leaves.get("gain", 1.0) * scale
    loss = (total * g_sum).sum()
    errors = {"sum": relative(out[0], total)}
    if norm:
        normed = F.layer_norm(total, (width,), leaves["weight"], leaves["shift"], 1e-5)
        loss = loss + (normed * g_normed).sum()
        errors["normed"] = relative(out[1], normed)
    loss.backward()
    order = ("branch", "residual", "bias", "gain", "weight", "shift")
    ours = dict(zip(order, gradients, strict=True))
    ours["residual"] = ours["residual"] if norm else g_sum
    ours["branch"] = ours["branch"] if gain or mask != "none" else ours["residual"]
    errors |= {f"grad {name}": relative(ours[name], leaf.grad) for name, leaf in leaves.items()}
    ones, zeros = torch.ones(rows, width), torch.zeros(rows, width)
    exact = OPS.residual_branch(ones, None, None, zeros, None, None, 0.0, *masks)[0]
    return {
        "name": f"residual {rows}x{width} {dtype} {mask} gain={gain} bias={bias} norm={norm}",
        "half": dtype != torch.float32,
        "errors": errors,
        "same_mask": torch.equal(exact, scale.float()),
    }


def activation_case(rows: int, width: int, dtype: torch.dtype, gelu: bool, bias: bool) -> Any:
    x, g = (normal(rows, width, dtype=dtype, seed=s) for s in (0, 1))
    b = normal(width, dtype=dtype, seed=2) if bias else None
    y = OPS.bias_activation(x, b, gelu)
    grad_x, grad_bias = OPS.bias_activation_backward(g, x if gelu else y, b, gelu)
    leaf, bias_leaf = (t.double().requires_grad_() for t in (x, b if b is not None else torch.zeros(width)))
    truth = (F.gelu if gelu else F.relu)(leaf + bias_leaf)
    (truth * g).sum().backward()
    errors = {"y": relative(y, truth), "grad x": relative(grad_x, leaf.grad)}
    if bias:
        errors["grad bias"] = relative(grad_bias, bias_leaf.grad)
    name = f"activation {rows}x{width} {dtype} gelu={gelu} bias={bias}"
    return {"name": name, "half": dtype != torch.float32, "errors": errors}


def vocabulary_case(rows: int, words: int, valid: int, dtype: torch.dtype, bias: bool, vocab_start: int = 0) -> Any:
    """Both ways to the gradient, of a shard whose softmax is its own; labels outside it and ignored rows among them."""
    logits = normal(rows, words, dtype=dtype, seed=3) * 3
    b = normal(words, dtype=dtype, seed=4) if bias else None
    labels = torch.randint(vocab_start, vocab_start + valid, (rows,), generator=torch.Generator().manual_seed(5))
    labels[1], labels[2] = -1, vocab_start + words + 3
    factors = torch.rand(rows, generator=torch.Generator().manual_seed(6))
    factors[1], factors[3] = 0.0, 0.0
    leaf = logits.double().requires_grad_()
    z = (leaf if b is None else leaf + b.double())[:, :valid]
    local = labels - vocab_start
    here = (local >= 0) & (local < valid)
    target = torch.where(here, z.gather(1, local.clamp(0, valid - 1)[:, None])[:, 0], 0.0)
    (factors.double() * (z.logsumexp(1) - target)).sum().backward()
    lse, picked = OPS.vocabulary_sums(logits, b, labels, vocab_start, valid)
    apart = logits.clone()
    OPS.vocabulary_gradient_(apart, b, labels, factors, lse, vocab_start, valid)
    at_once = logits.clone()
    again = OPS.vocabulary_loss_(at_once, b, labels, factors, vocab_start, valid)
    errors = {"lse": relative(lse, z.logsumexp(1).detach()), "gradient": relative(apart, leaf.grad)}
    errors["target"] = relative(picked, target.detach())
    equal = torch.equal(apart, at_once) and torch.equal(lse, again[0]) and torch.equal(picked, again[1])
    zero = float(at_once[:, valid:].abs().sum() + at_once[1].abs().sum() + at_once[3].abs().sum())
    name = f"vocabulary {rows}x{words} valid {valid} {dtype} bias={bias} start={vocab_start}"
    return {"name": name, "half": dtype != torch.float32, "errors": errors, "equal": equal, "where_zero": zero}


def main() -> None:
    torch.set_num_threads(1)
    half, full = torch.bfloat16, torch.float32
    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(triton_fused, "PROGRAMS", 4),
        mock.patch.dict(triton_fused.VOCABULARY_LAUNCH, BLOCK=64),
        mock.patch.dict(triton_fused.REDUCE_TILE, ROWS=2),
    ):
        parts = {"none": ("", "b", "bn"), "rows": ("gbn", "", "g"), "elements": ("gb", "bn", "n")}
        cases = [
            residual_case(9, 40, full, mask, "g" in there, "b" in there, "n" in there)
            for mask, choices in parts.items()
            for there in choices
        ]
        cases += [residual_case(6, w, half, m, True, True, True) for w, m in zip((384, 768, 1024), parts, strict=True)]
        cases += [residual_case(3, 33, half, mask, False, True, True) for mask in parts]
        for gelu, bias in itertools.product((True, False), (True, False)):
            cases += [activation_case(11, 40, full, gelu, bias), activation_case(9, 1030, half, gelu, bias)]
        for bias in (True, False):
            cases += [
                vocabulary_case(5, 150, 131, full, bias),
                vocabulary_case(5, 150, 150, half, bias, vocab_start=300),
            ]
        nothing = OPS.vocabulary_sums(torch.ones(2, 70), None, torch.tensor([3, 4]), 100, 0)
    result = {"cases": cases, "padding_only": nothing[0].isneginf().all().item()}
    with open(sys.argv[1], "w") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main()
