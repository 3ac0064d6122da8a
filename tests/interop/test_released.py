"""Exchange with the released code: its numbers from its weights, its keys both ways, any layout.

`released_losses.json` was produced by the released code itself; weights and pixels are closed formulas, so
nothing of it is needed here.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lcl_kernels import infonce_reference, linear_cross_entropy_reference
from torch import Tensor, nn

from batches import OPT
from launch import last_json, run_script, torchrun
from lcl_mcore.batch import MicroBatch
from lcl_mcore.checkpoint.weights_file import load_consolidated, read_consolidated, write_consolidated
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import read_config, write_config
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.errors import CheckpointError, ConfigError
from lcl_mcore.interop.released import from_released, read_released, shape_of_released, to_released
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.stages import stage_of
from reference_model import ReferenceLcl

Build = Callable[..., LclModel]

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "released_losses.json").read_text())
VOCABULARY, PATCHES, LENGTH = 261, 9, 40
BEGIN, END, HOLE, BOI, EOI = range(VOCABULARY - 5, VOCABULARY)
SHAPE = ModelConfig(
    vision=VisionConfig(image_size=48, patch_size=16, width=64, layers=2, heads=4, mlp_width=256),
    language=LanguageConfig(
        vocab_size=VOCABULARY,
        width=48,
        layers=3,
        heads=2,
        mlp_width=192,
        activation="gelu",
        max_positions=LENGTH,
        position_offset=0,
        tied_head=False,
        separate_norms=True,
        init="clip_text",
    ),
    pool_heads=4,
)
IMAGE = [BOI, *[HOLE] * PATCHES, EOI]
SEQUENCES = [
    [[BEGIN, 5, 6, 7, *IMAGE, 8, 9, *IMAGE, 10, 11, 12, END], [*IMAGE, 20, 21, 22, END], [BEGIN, 30, 31, *IMAGE]],
    [[BEGIN, *IMAGE, 40, 41, END], [BEGIN, 50, 51, 52, 53, *IMAGE]],
]


def wave(name: str, size: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1] that look random and are the same everywhere, fp64."""
    key = zlib.crc32(name.encode()) % 1009 + 1
    x = torch.arange(1, math.prod(size) + 1, dtype=torch.float64)
    return torch.sin(x * x * 0.37 + x * key * 0.011 + key).reshape(size)


def released_state(shape: ModelConfig = SHAPE) -> dict[str, Tensor]:
    """Weights under the released names, which are the reference model's own."""
    state = {}
    for name, parameter in ReferenceLcl(shape).named_parameters():
        values = wave(name, tuple(parameter.shape))
        if name == "logit_scale":
            state[name] = torch.tensor(2.5)
        elif any(part in name for part in ("ln_", "norm1", "lm_head.0")):
            state[name] = (float(name.endswith("weight")) + 0.2 * values).float()
        else:
            state[name] = (0.15 * values).float()
    return state


def released_batch(rank: int) -> MicroBatch:
    """The sequences of a rank, each padded to one length, with the released rules for targets and contexts."""
    tokens: list[int] = []
    starts: list[int] = []
    lengths, contexts, context_images, targets, labels = [], [], [], [], []
    for sequence in SEQUENCES[rank]:
        base = len(tokens)
        for i, token in enumerate(sequence):
            if token == BOI:
                if i > 0:
                    contexts.append(base + i)
                    context_images.append(len(starts))
                starts.append(base + i + 1)
            if i > 0 and token not in (HOLE, EOI, 0):
                targets.append(base + i - 1)
                labels.append(token)
        tokens += sequence + [0] * (LENGTH - len(sequence))
        lengths += [len(sequence), LENGTH - len(sequence)]
    pixels = (wave(f"image{rank}", (len(starts), 3, 48, 48)) * 0.5 + 0.5) * 255
    count = len(SEQUENCES[rank])
    return MicroBatch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(LENGTH).repeat(count),
        lengths=tuple(lengths),
        images=pixels.to(torch.uint8),
        image_starts=torch.tensor(starts),
        context_positions=torch.tensor(contexts),
        context_images=torch.tensor(context_images),
        target_positions=torch.tensor(targets),
        target_labels=torch.tensor(labels),
        image_keys=torch.arange(len(starts)),
        sequence_keys=torch.arange(count),
        group_ids=torch.arange(len(contexts)),
    )


def check_gradients(gradients: dict[str, Tensor]) -> None:
    """Norm and inner product with a fixed vector of every gradient against the released code's."""
    golden = GOLDEN["gradients_of_2_ranks"]
    assert gradients.keys() == golden.keys()
    for name, gradient in gradients.items():
        norm, probe = golden[name]
        ours = gradient.double()
        if name.endswith(("norm1_k.bias", "k_bias")):  # zero but for rounding: see `worst_gradient`
            assert float(ours.norm()) < 1e-6, name
            continue
        assert float(ours.norm()) == pytest.approx(norm, rel=2e-5), name
        inner = float((ours * wave("probe" + name, tuple(gradient.shape))).sum())
        assert inner == pytest.approx(probe, abs=2e-5 * norm * math.sqrt(gradient.numel())), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reference_model_gives_the_released_losses(ranks: int) -> None:
    reference = ReferenceLcl(SHAPE)
    reference.load_state_dict(released_state())
    contrastive, generation = reference.losses([released_batch(rank) for rank in range(ranks)], "rank")
    golden = GOLDEN[f"ranks_{ranks}"]
    assert contrastive.item() == pytest.approx(golden["contrastive"], rel=1e-6)
    assert generation.item() == pytest.approx(golden["generation"], rel=1e-6)
    if ranks == 2:
        (0.1 * contrastive + generation).backward()
        check_gradients({n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("ranks", [1, 2])
def test_imported_weights_give_the_released_losses_and_gradients(build: Build, ranks: int) -> None:
    model = build(SHAPE, initialize=False)
    load_consolidated(model, from_released(released_state(), SHAPE), 0, 1)
    images, contexts, weights = [], [], []
    generation = torch.zeros(())
    for rank in range(ranks):
        batch = released_batch(rank)
        features, hidden = model(batch)
        images.append(model.image_embeds(batch, features.vectors))
        contexts.append(model.context_embeds(batch, hidden))
        weights.append(torch.full((len(images[-1]),), 1 / (ranks * len(images[-1]))))
        total = linear_cross_entropy_reference(
            model.language.targets(hidden, batch.target_positions),
            model.language.head_weight,
            batch.target_labels,
            valid_vocab=VOCABULARY,
        )
        generation = generation + total / (ranks * len(batch.target_positions))
    contrastive = infonce_reference(
        torch.cat(images), torch.cat(contexts), model.temperature(), weights=torch.cat(weights)
    )
    golden = GOLDEN[f"ranks_{ranks}"]
    assert contrastive.item() == pytest.approx(golden["contrastive"], rel=1e-5)
    assert generation.item() == pytest.approx(golden["generation"], rel=1e-5)
    if ranks == 2:
        (0.1 * contrastive + generation).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        check_gradients(to_released(gradients, SHAPE))


def test_both_directions_are_exact(build: Build) -> None:
    state = released_state()
    back = to_released(from_released(state, SHAPE), SHAPE)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    model = build(SHAPE, seed=4)
    own = {name: p.detach() for name, p in model.named_parameters()}
    again = build(SHAPE, seed=5)
    load_consolidated(again, from_released(to_released(own, SHAPE), SHAPE), 0, 1)
    for name, parameter in again.named_parameters():
        real = slice(0, VOCABULARY) if name in ("language.head", "language.token_embedding.weight") else slice(None)
        assert torch.equal(parameter[real], own[name][real]), name
        assert real.stop is None or parameter[VOCABULARY:].eq(0).all(), name


class Share(nn.Module):
    """The parameters that one of `tp` ranks would hold, under the same names and with the same marks."""

    stage = stage_of((2,), 0)

    @staticmethod
    def canonical_name(name: str) -> str:
        return name

    def __init__(self, model: nn.Module, tp: int) -> None:
        super().__init__()
        self.shares = {}
        for name, parameter in model.named_parameters():
            size = list(parameter.shape)
            split = getattr(parameter, "tensor_model_parallel", False)
            axis = getattr(parameter, "partition_dim", 0)
            if split:
                size[axis] //= tp
            share = nn.Parameter(torch.full(size, torch.nan))
            share.tensor_model_parallel, share.partition_dim = split, axis  # type: ignore[attr-defined]
            self.shares[name] = share

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.shares.items())


def test_every_rank_gets_whole_heads(build: Build) -> None:
    whole = build(SHAPE, initialize=False)
    state = from_released(released_state(), SHAPE)
    load_consolidated(whole, state, 0, 1)
    ranks = [Share(whole, 2) for _ in range(2)]
    for rank, share in enumerate(ranks):
        load_consolidated(share, state, rank, 2)
    split = 0
    for name, parameter in whole.named_parameters():
        parts: list[Tensor] = [share.shares[name] for share in ranks]
        if parts[0].shape == parameter.shape:
            assert all(torch.equal(part, parameter) for part in parts), name
            continue
        split += 1
        axis = parameter.partition_dim
        assert torch.equal(torch.cat(parts, axis), parameter), name
    assert split == 5 * 6 + 7 + 2  # per layer 6 (qkv, fc1: weight and bias; proj, fc2), pool 7, two vocabularies
    # Head 0 of layer 0 lies on rank 0: its queries, keys and values are the first rows of each released part.
    rows = ranks[0].shares["language.blocks.layers.0.self_attention.linear_qkv.weight"]
    stacked = released_state()["text.transformer.resblocks.0.attn.in_proj_weight"]
    assert torch.equal(rows, torch.cat([stacked[start : start + 24] for start in (0, 48, 96)]))


@pytest.mark.parametrize("recipe", ["released-b16-laion", "released-b32-laion", "released-b32-mmc4"])
def test_the_released_models_are_recognised(recipe: str) -> None:
    shape = load_recipe(recipe).model
    with torch.device("meta"):
        state = {name: p.detach() for name, p in ReferenceLcl(shape).named_parameters()}
    assert len(state) == 318
    assert shape_of_released(state) == shape
    full = from_released(state, shape)
    assert len(full) == 318
    assert sum(tensor.numel() for tensor in full.values()) == sum(tensor.numel() for tensor in state.values())


def test_misfits_are_named() -> None:
    state = released_state()
    state["visual.proj"] = torch.zeros(64, 48)
    del state["lm_head.0.bias"]
    state["text.ln_final.weight"] = torch.zeros(47)
    with pytest.raises(CheckpointError) as caught:
        from_released(state, SHAPE)
    assert str(caught.value) == (
        "released weights: do not fit this model (missing: lm_head.0.bias; unexpected: visual.proj; "
        "shape: text.ln_final.weight is (47,), the model has (48,)). Give the configuration it was trained with."
    )
    with pytest.raises(CheckpointError, match=r"has no `visual\.conv1\.weight`"):
        shape_of_released({"weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"language\.tied_head = True"):
        from_released(released_state(), OPT)


def test_a_model_is_left_alone_when_weights_do_not_fit(build: Build) -> None:
    model = build(SHAPE, seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    state = from_released(released_state(), SHAPE)
    state["pool.query"] = state["pool.query"][:, :, :-1]
    with pytest.raises(CheckpointError) as caught:
        load_consolidated(model, state, 0, 1)
    assert str(caught.value) == (
        "weights: do not fit this model (shape: pool.query is (1, 1, 63), the model has (1, 1, 64)). "
        "Use the config.yaml beside it."
    )
    with pytest.raises(CheckpointError) as caught:
        load_consolidated(model, {}, 0, 1)
    assert str(caught.value).count("missing: ") == 6
    assert str(caught.value).endswith(f"and {len(before) - 6} more). Use the config.yaml beside it.")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


def test_files_that_are_not_plain_tensors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "epoch_1.pt"
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\)"):
        read_released(file)
    torch.save({"state_dict": Malicious()}, file)
    with pytest.raises(CheckpointError, match="cannot be loaded as plain tensors"):
        read_released(file)
    assert "executed" not in capsys.readouterr().out
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="it is no zip, as torch writes since"):
        read_released(file)
    torch.save({"state_dict": {"a": 1}}, file)
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_released(file)
    torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(2)}}, file)
    assert read_released(file)["a"].tolist() == [1.0, 1.0]


def test_weights_files_are_checked(tmp_path: Path) -> None:
    state = from_released(released_state(), SHAPE)
    path = write_consolidated(state, SHAPE, tmp_path / "weights")
    again = read_consolidated(tmp_path / "weights")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_consolidated(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_consolidated(tmp_path / "nowhere.safetensors")


def test_the_tool_writes_weights_and_a_configuration(tmp_path: Path) -> None:
    shape = ModelConfig(
        vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=1, heads=2, mlp_width=512),
        language=LanguageConfig(
            vocab_size=49411,
            width=128,
            layers=1,
            heads=2,
            mlp_width=512,
            activation="gelu",
            max_positions=32,
            position_offset=0,
            tied_head=False,
            separate_norms=True,
            init="clip_text",
        ),
        pool_heads=2,
    )
    with torch.no_grad():
        state = {name: torch.randn(p.shape) for name, p in ReferenceLcl(shape).named_parameters()}
    torch.save({"epoch": 1, "name": "x", "state_dict": state}, tmp_path / "epoch_1.pt")
    command = ["tools/import_released.py", str(tmp_path / "epoch_1.pt"), "--out", str(tmp_path / "out"), "--tp"]
    refused = run_script(*command, "3")
    assert refused.returncode == 2
    assert "model.language.heads = 2 with parallel.tensor_parallel_size = 3" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run_script(*command, "2")
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "out" / "config.yaml")
    assert config.model == shape
    assert (config.parallel.tensor_parallel_size, config.loss.averaging, config.data.context_rule) == (
        2,
        "rank",
        "index0",
    )
    full = read_consolidated(tmp_path / "out")
    assert all(torch.equal(value, state[name]) for name, value in to_released(full, shape).items())

    # And back: nothing passes through the precision that the configuration computes with.
    config = replace(config, train=replace(config.train, precision="bf16"))
    write_config(config, tmp_path / "out")
    exported = tmp_path / "exported"
    done = run_script(
        "tools/export_encoder.py", str(tmp_path / "out"), "--out", str(exported), "--formats", "released", "full"
    )
    assert done.returncode == 0, done.stderr
    again = read_released(exported / "released" / "model.pt")
    assert again.keys() == state.keys()
    assert [name for name in state if not torch.equal(again[name], state[name])] == []
    assert read_config(exported / "full" / "config.yaml") == config


@pytest.mark.distributed
def test_imported_weights_give_the_released_losses_at_tp_2(tmp_path: Path) -> None:
    write_consolidated(from_released(released_state(), SHAPE), SHAPE, tmp_path)
    done = torchrun(2, "tests/interop/released_worker.py", str(tmp_path))
    contrastive, generation, head = last_json(done)
    assert head == [192, 48]  # half of 261 rows padded to 384
    assert contrastive == pytest.approx(GOLDEN["ranks_1"]["contrastive"], rel=1e-5)
    assert generation == pytest.approx(GOLDEN["ranks_1"]["generation"], rel=1e-5)
