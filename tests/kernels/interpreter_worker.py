"""Runs the Triton kernels in the interpreter and writes errors against fp64 as JSON.

Usage: TRITON_INTERPRET=1 interpreter_worker.py RESULT.json. A process of its own, because Triton reads the
variable when its decorators run. Every buffer from ``torch.empty`` starts as NaN, so an element that is
read without having been written, or never written, shows in the numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from lcl_kernels import infonce, infonce_reference, triton_engine
from lcl_kernels.triton_config import INTERPRETER
from torch import Tensor
from torch.nn.functional import normalize

real_empty = torch.empty


def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    result = real_empty(*args, **kwargs)
    return result.fill_(float("nan")) if result.is_floating_point() else result.fill_(-(2**30))


def embeddings(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    image = normalize(torch.randn(n, d, generator=generator), dim=1)
    noise = normalize(torch.randn(n, d, generator=generator), dim=1)
    if kind == "random":
        return image, noise
    if kind == "trained":
        return image, normalize(image + 3.0 * noise, dim=1)
    if kind == "saturated":
        return image, normalize(image + noise, dim=1)
    if kind == "identical":
        return image[:1].repeat(n, 1), image[:1].repeat(n, 1)
    if kind == "opposite":
        return image[:1].repeat(n, 1), -image[:1].repeat(n, 1)
    if kind == "duplicates":
        return image[torch.arange(n) // 2], noise[torch.arange(n) // 2]
    raise ValueError(kind)


def relative(ours: Tensor, truth: Tensor, floor: float = 1e-9) -> float:
    return float((ours.double() - truth).norm() / truth.norm().clamp_min(floor))


def case(
    n: int,
    d: int,
    scale: float,
    *,
    kind: str = "trained",
    precision: str = "fp32",
    groups: bool = False,
    weights: bool = False,
    rows: int | None = None,
    tma: bool = True,
) -> dict[str, Any]:
    image, text = embeddings(kind, n, d)
    if precision == "fp16":  # what remains to be measured is the kernels' own rounding
        image, text = image.half(), text.half()
    group_ids = torch.arange(n) // 3 if groups else None
    w = torch.rand(n, generator=torch.Generator().manual_seed(3)) if weights else None
    if w is not None:
        w[::5] = 0.0
    outcome = []
    for impl, dtype in (("reference", torch.float64), ("triton", image.dtype)):
        i, t = (x.to(dtype).requires_grad_() for x in (image, text))
        s = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        if impl == "reference":
            loss = infonce_reference(i, t, s, weights=w, group_ids=group_ids)
        else:
            with (
                mock.patch.object(torch, "empty", poisoned_empty),
                mock.patch.object(triton_engine, "INTERPRETER", replace(INTERPRETER, tma=tma)),
            ):
                # fp16 inputs would also round the returned gradients: ask for them in fp32.
                i, t = (x.detach().float().requires_grad_() for x in (i, t))
                loss = infonce(
                    i,
                    t,
                    s,
                    weights=w,
                    group_ids=group_ids,
                    impl="triton",
                    precision=precision,
                    tile=(rows, 0) if rows else None,
                )
        loss.backward()
        outcome.append((loss.detach(), i.grad, t.grad, s.grad))
    truth, ours = outcome
    # Equal vectors: the exact gradient is a difference of equal terms, so compare with the size of the terms.
    cancels = kind in ("identical", "opposite")
    floor = scale * n**-0.5 if cancels else 1e-9
    return {
        "name": f"{n}x{d} s={scale} {kind} {precision} groups={groups} weights={weights} {rows} {tma}",
        "precision": precision,
        "loss": abs(ours[0].item() - truth[0].item()) / max(abs(truth[0].item()), 1e-9),
        "image": relative(ours[1], truth[1], floor),
        "text": relative(ours[2], truth[2], floor),
        "scale": abs(ours[3].item() - truth[3].item()) / max(abs(truth[3].item()), 1.0 if cancels else 1e-9),
        "truth": truth[0].item(),
    }


def block_case(m: int, k: int, d: int, columns: bool, scale: float) -> dict[str, Any]:
    """A rectangular block as the distributed loss uses it, against the formula in fp64."""
    generator = torch.Generator().manual_seed(m + k)
    x = normalize(torch.randn(m, d, generator=generator), dim=1)
    y = normalize(torch.randn(k, d, generator=generator), dim=1)
    x_keys, y_keys = (torch.arange(10, 10 + c, dtype=torch.int32) for c in (m, k))
    s = torch.tensor(scale)
    with mock.patch.object(torch, "empty", poisoned_empty):
        block = triton_engine.TritonBlock(x, y, x_keys, y_keys, s, tile=(48, 0))
        lr, lc = block.lse(columns=columns)
    logits = (scale * x.double() @ y.double().T).masked_fill(x_keys[:, None] == y_keys, -torch.inf)
    row, col = logits.logsumexp(1), logits.logsumexp(0)
    with mock.patch.object(torch, "empty", poisoned_empty):
        dx, dy = block.gradients(row.float(), col.float(), want_y=columns)
    g = (logits - row[:, None]).exp() + (logits - col).exp()
    worst = [float((lr - row).abs().max()), relative(dx, g @ y.double())]
    if columns:
        worst += [float((lc - col).abs().max()), relative(dy, g.T @ x.double())]
    return {"name": f"block {m}x{k}x{d} columns={columns} s={scale}", "worst": max(worst)}


def main() -> None:
    torch.set_num_threads(1)
    cases = [case(77, 64, s, precision=p) for s in (1.0, 14.3, 50.0, 100.0) for p in ("fp32", "fp16")]
    cases += [
        case(133, 96, 100.0, groups=True, weights=True, rows=40),
        case(133, 96, 100.0, groups=True, weights=True, rows=40, precision="fp16", tma=False),
        case(133, 96, 100.0, groups=True, weights=True, rows=40, tma=False),
        case(61, 33, 14.3, precision="tf32x3", rows=17),
        case(61, 33, 14.3, rows=17, tma=False),
        case(40, 1024, 100.0, kind="random"),
        case(40, 64, 100.0, kind="saturated"),
        case(40, 64, 100.0, kind="identical"),
        case(40, 64, 100.0, kind="opposite"),
        case(40, 64, 100.0, kind="opposite", precision="fp16"),
        case(41, 64, 100.0, kind="duplicates", groups=True),
        case(1, 16, 100.0),
        case(2, 16, 100.0, kind="opposite"),
        case(3, 16, 0.0),
    ]
    blocks = [
        block_case(7, 90, 48, True, 14.3),
        block_case(90, 7, 48, True, 100.0),
        block_case(33, 65, 40, False, 50.0),
    ]
    # The fallback must run when forced and be skipped otherwise: the same numbers by either way.
    with mock.patch.object(triton_engine, "smallest_sum", return_value=float("inf")):
        cases.append(case(77, 64, 14.3) | {"name": "forced fallback"})
    with mock.patch.object(triton_engine, "_fallback"):
        broken = case(40, 64, 100.0, kind="opposite")["loss"]
    with open(sys.argv[1], "w") as out:
        json.dump({"cases": cases, "blocks": blocks, "without_fallback": broken}, out)


if __name__ == "__main__":
    main()
