"""Runs the fused element-wise Triton kernels in the interpreter; writes errors against formulas in fp64 as JSON.

Usage: TRITON_INTERPRET=1 fused_interpreter_worker.py RESULT.json. Buffers from ``torch.empty`` and its kin start as
NaN, so an element that is read without having been written, or never written, shows in the numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any, get_args
from unittest import mock

import torch
from lcl_kernels import (
    bias_activation,
    bias_activation_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    residual_branch,
    residual_branch_reference,
    triton_fused,
)
from lcl_kernels.activation import Activation
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


def residual_case(rows: int, width: int, dtype: torch.dtype, mask: str, parts: str) -> Any:
    """Forward and backward of one residual branch with some of gain (g), bias (b) and norm (n); and its exact mask."""
    made = {"residual": (rows, width), "branch": (rows, width), "bias": (width,), "gain": (width,)}
    made |= {"weight": (width,), "shift": (width,)}
    key = {"bias": "b", "gain": "g", "weight": "n", "shift": "n"}
    x = {n: normal(*s, dtype=dtype, seed=i) for i, (n, s) in enumerate(made.items()) if key.get(n, "") in parts}
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(9))
    options: dict[str, Any] = {}
    scale = torch.ones(rows, width, dtype=torch.float64)
    if mask == "rows":
        options["row_scale"] = torch.tensor([1.25, 0.0, 1.25])
        scale *= options["row_scale"].repeat_interleave(rows // 3)[:, None]
    if mask == "elements":
        options["dropout"] = keys, DROPOUT
        scale *= drawn(keys, width) * (65536 / (65536 - round(DROPOUT * 65536)))
    weights = [normal(rows, width, dtype=dtype, seed=s) for s in (7, 8)]
    outcome = []
    for function, cast in ((residual_branch, dtype), (residual_branch_reference, torch.float64)):
        leaves = {name: value.detach().to(cast).requires_grad_() for name, value in x.items()}
        norm = (leaves["weight"], leaves["shift"], 1e-5) if "n" in parts else None
        out = function(
            leaves["residual"], leaves["branch"], bias=leaves.get("bias"), gain=leaves.get("gain"), norm=norm, **options
        )
        pairs = [(o, w) for o, w in zip(out, weights, strict=True) if o is not None]
        torch.autograd.backward([o for o, _ in pairs], [w.to(cast) for _, w in pairs])
        results = {f"output {i}": o.detach() for i, (o, _) in enumerate(pairs)}
        outcome.append(results | {f"grad {name}": leaf.grad for name, leaf in leaves.items()})
    ours, truth = outcome
    exact, _ = residual_branch(torch.zeros(rows, width), torch.ones(rows, width), **options)
    return {
        "name": f"residual {rows}x{width} {dtype} {mask} {parts}",
        "half": dtype != torch.float32,
        "errors": {name: relative(ours[name], truth[name]) for name in truth},
        "same_mask": torch.equal(exact, scale.float()),
    }


def activation_case(rows: int, width: int, dtype: torch.dtype, kind: Activation, bias: bool) -> Any:
    values = [normal(rows, width, dtype=dtype, seed=0)] + [normal(width, dtype=dtype, seed=2)] * bias
    g = normal(rows, width, dtype=dtype, seed=1)
    ours, truth = ([v.detach().to(d).requires_grad_() for v in values] for d in (dtype, torch.float64))
    y = bias_activation(ours[0], ours[1] if bias else None, kind)
    y.backward(g)
    expected = bias_activation_reference(truth[0], truth[1] if bias else None, kind)
    expected.backward(g.double())
    errors = {"y": relative(y.detach(), expected.detach())}
    errors |= {f"grad {i}": relative(a.grad, b.grad) for i, (a, b) in enumerate(zip(ours, truth, strict=True))}
    return {"name": f"{kind} {rows}x{width} {dtype} bias={bias}", "half": dtype != torch.float32, "errors": errors}


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
    OPS.vocabulary_gradient(apart, b, labels, factors, lse, vocab_start, valid)
    at_once = logits.clone()
    again = OPS.vocabulary_loss(at_once, b, labels, factors, vocab_start, valid)
    errors = {"lse": relative(lse, z.logsumexp(1).detach()), "gradient": relative(apart, leaf.grad)}
    errors["target"] = relative(picked, target.detach())
    equal = torch.equal(apart, at_once) and torch.equal(lse, again[0]) and torch.equal(picked, again[1])
    zero = float(at_once[:, valid:].abs().sum() + at_once[1].abs().sum() + at_once[3].abs().sum())
    name = f"vocabulary {rows}x{words} valid {valid} {dtype} bias={bias} start={vocab_start}"
    return {"name": name, "half": dtype != torch.float32, "errors": errors, "equal": equal, "where_zero": zero}


def cross_entropy_case(dtype: torch.dtype, bias: bool) -> Any:
    """The whole function in chunks, against its reference."""
    torch.manual_seed(0)
    shapes = [(11, 24), (70, 24)] + [(70,)] * bias
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    labels = torch.randint(0, 66, (11,))
    labels[4] = -1

    def call(function: Callable[..., Tensor], cast: torch.dtype, **options: Any) -> list[Tensor]:
        x = [v.to(cast).requires_grad_() for v in values]
        loss = function(x[0], x[1], labels, bias=x[2] if bias else None, valid_vocab=66, **options)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    truth = call(linear_cross_entropy_reference, torch.float64)
    names = ("loss", "hidden", "weight", "bias")
    ours = call(linear_cross_entropy, dtype, impl="triton", chunk_rows=4)
    errors = {n: relative(a, b) for n, a, b in zip(names, ours, truth, strict=False)}
    return {"name": f"cross-entropy {dtype} bias={bias}", "half": dtype != torch.float32, "errors": errors}


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
        choices = {"none": ("", "b", "bn"), "rows": ("gbn", "", "g"), "elements": ("gb", "bn", "n")}
        cases = [residual_case(9, 40, full, mask, parts) for mask, some in choices.items() for parts in some]
        cases += [residual_case(6, w, half, m, "gbn") for w, m in zip((384, 768, 1024), choices, strict=True)]
        cases += [residual_case(3, 33, half, mask, "bn") for mask in choices]
        for kind, bias in itertools.product(get_args(Activation), (True, False)):
            cases += [activation_case(11, 40, full, kind, bias), activation_case(9, 1030, half, kind, bias)]
        for bias in (True, False):
            cases += [
                vocabulary_case(5, 150, 131, full, bias),
                vocabulary_case(5, 150, 150, half, bias, vocab_start=300),
            ]
            cases.append(cross_entropy_case(full, bias))
        cases.append(cross_entropy_case(half, False))
        nothing = OPS.vocabulary_sums(torch.ones(2, 70), None, torch.tensor([3, 4]), 100, 0)
    result = {"cases": cases, "padding_only": nothing[0].isneginf().all().item()}
    with open(sys.argv[1], "w") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main()
