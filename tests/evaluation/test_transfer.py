"""Transfer with pairs: a corpus whose colours determine the captions, plain references, and what is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lcl_mcore.config.data import TokenizerConfig
from lcl_mcore.config.evaluation import CaptionConfig, PairsConfig, RetrievalConfig
from lcl_mcore.config.model import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.errors import ConfigError, NonFiniteError
from lcl_mcore.evaluation import caption_transfer as captions
from lcl_mcore.evaluation import retrieval_transfer as towers
from lcl_mcore.evaluation.captioned import CaptionDataset
from lcl_mcore.evaluation.commands import _both_pairs, parse, transfer_settings
from lcl_mcore.evaluation.loading import LoadedModel
from lcl_mcore.evaluation.transfer import Encoder, check_apart, drop_path, vit

SHAPE = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=4, mlp_width=64),
    language=LanguageConfig(
        vocab_size=306, width=32, layers=2, heads=4, mlp_width=64, max_positions=48, dropout=0.1
    ),
    pool_heads=4,
)
COLOURS = torch.cartesian_prod(*[torch.tensor([30.0, 220.0])] * 3)
CAPTIONS = (
    "an old red cat by the house",
    "the large green dog",
    "blue round tree in the old house",
    "new square red tree",
    "a house with a red dog",
    "two green cats and a tree",
    "round blue house with square cat",
    "large old new tree",
)


def coloured(copies: int, seed: int) -> CaptionDataset:
    """Noisy images of eight colours, each with its colour's caption."""
    colours = torch.arange(8).repeat(copies)
    noise = 25 * torch.randn(len(colours), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    images = (COLOURS[colours][:, :, None, None] + noise).clamp(0, 255).byte()

    def fetch(indices: Sequence[int]) -> Tensor:
        return images[list(indices)]

    return CaptionDataset("colours", tuple((CAPTIONS[i],) for i in colours.tolist()), fetch)


@pytest.fixture(scope="module")
def opened(build: Callable[..., Any], groups: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model with random weights, as if it had been loaded."""
    from corpora import small_tokenizer
    from lcl_mcore.distributed.device import pick_device

    folder = tmp_path_factory.mktemp("transfer")
    small_tokenizer().save(folder / "tokenizer.json")
    device, model = pick_device("cpu"), build(SHAPE, train=False)
    recipe = load_recipe("demo")
    data = replace(recipe.data, tokenizer=TokenizerConfig(kind="file", path=str(folder)), sequence_length=48)
    job: Any = SimpleNamespace(device=device, groups=SimpleNamespace(megatron=groups), note=lambda line: None)
    state: Any = SimpleNamespace(step=0, images_seen=0)
    return LoadedModel(replace(recipe, model=SHAPE, data=data), model, job, folder, folder, state)


def constant(width: int) -> Encoder:
    """Says the same of every image."""
    return Encoder(width, lambda images, seed: torch.ones(len(images), 4, width), torch.device("cpu"))


def weights(opened: LoadedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in opened.model.vision.parameters()]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


RETRIEVAL = RetrievalConfig(steps=60, batch_size=16, lr=1e-2, chunk_size=16)


def make_towers(opened: LoadedModel, width: int, config: RetrievalConfig = RETRIEVAL) -> towers.DualEncoder:
    return towers.DualEncoder(SHAPE, width, opened.job, opened.tokenizer(), config)


def test_the_text_feature_is_that_of_the_plain_model_at_the_last_token(opened: LoadedModel) -> None:
    """Texts of unequal length in one call, against the reference model on one text at a time."""
    from batches import micro_batch
    from reference_model import ReferenceLcl

    two, tokenizer = make_towers(opened, 32), opened.tokenizer()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    state = opened.model.state_dict() | {f"language.{k}": v for k, v in two.language.state_dict().items()}
    reference = ReferenceLcl(SHAPE)
    reference.load_lcl_state({k: v for k, v in state.items() if v is not None})
    with torch.no_grad():
        found = two.text_vectors(CAPTIONS[:3])
        for text, vector in zip(CAPTIONS, found, strict=False):
            ids = torch.tensor([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
            batch = replace(
                micro_batch(SHAPE, [[(3,)]]),
                tokens=ids,
                positions=torch.arange(len(ids)),
                lengths=(len(ids),),
            )
            hidden = reference.read(batch, torch.zeros(0, 4, 32))
            expected = reference.contexts(hidden, torch.tensor([len(ids) - 1]))[0]
            torch.testing.assert_close(vector, expected / expected.norm(), atol=2e-6, rtol=1e-5)
    assert float((found @ found.T).fill_diagonal_(0).abs().max()) < 0.999


def test_a_batch_in_parts_has_the_gradient_of_the_whole(opened: LoadedModel) -> None:
    train, losses, gradients = coloured(2, 0), [], []
    before = weights(opened)
    for chunk in (16, 5):
        two = make_towers(opened, 32)
        config = replace(
            RETRIEVAL, transfer="full", steps=1, batch_size=16, chunk_size=chunk, encoder_lr=1e-30
        )
        encoder = vit(opened.model, full=True)
        losses.append(towers.train_towers(two, encoder, train, config))
        gradients.append([p.grad for p in [*two.parameters(), *encoder.parameters] if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(gradients[0]) == len(gradients[1]) > 60
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6 + 1e-4 * float(whole.abs().max()), rtol=0)
    opened.model.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(opened.model.vision.parameters(), before, strict=True):
            parameter.copy_(value)


def test_retrieval_is_perfect_where_colours_are_seen_and_chance_where_not(opened: LoadedModel) -> None:
    train, test, before = coloured(8, 0), coloured(1, 1), weights(opened)
    two, encoder = make_towers(opened, 32), vit(opened.model)
    loss = towers.train_towers(two, encoder, train, RETRIEVAL)
    found = towers.score_towers(two, encoder, test)
    assert (found["TR@1"], found["IR@1"]) == (1.0, 1.0)
    assert loss < 1.2  # log 16 is 2.8; two of a colour in a batch cannot be told apart
    assert same(before, weights(opened))
    two = make_towers(opened, 32)
    towers.train_towers(two, constant(32), train, RETRIEVAL)
    found = towers.score_towers(two, constant(32), test)
    assert (found["TR@1"], found["IR@1"]) == (1 / 8, 0.0)  # ties count against a query


def test_full_transfer_moves_the_encoder_and_gives_it_back(opened: LoadedModel) -> None:
    train, test, before = coloured(2, 0), coloured(1, 1), weights(opened)
    moved: list[bool] = []
    config = replace(RETRIEVAL, transfer="full", steps=2, batch_size=8)
    original = towers.score_towers

    def watch(*arguments: Any) -> dict[str, float]:
        moved.append(not same(before, weights(opened)))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "score_towers", watch)
        result = towers.retrieval_transfer(opened, train, test, config, baselines=False)
        frozen = towers.retrieval_transfer(opened, train, test, replace(config, transfer="frozen"))
    assert moved == [True, False, False, False]
    assert "random_init" not in result
    assert {"trained", "random_init", "pixels", "chance"} <= set(frozen)
    assert frozen["task"] == "retrieval, frozen transfer"
    assert frozen["training"]["steps"] == 2
    assert same(before, weights(opened))  # the random weights of the run's seed are what the fixture has, too
    assert frozen["random_init"] == frozen["trained"]
    assert frozen["pixels"] != frozen["trained"]


CAPTION = CaptionConfig(steps=80, batch_size=8, lr=1e-2, chunk_size=6, text_tokens=30, warmup=0.1)


def test_captions_are_reproduced_where_colours_are_seen(opened: LoadedModel) -> None:
    train, test, before = coloured(4, 0), coloured(1, 1), weights(opened)
    scores = {}
    for name, encoder in {"seen": vit(opened.model), "unseen": constant(32)}.items():
        writer = captions.make_writer(opened, CAPTION, None)
        connector = captions.make_connector(encoder.width, writer.width, 0)
        loss = captions.train_writer(writer, connector, encoder, train, CAPTION)
        scores[name] = captions.score_writer(writer, connector, encoder, test, 30)
        assert scores[name]["test_loss"] == pytest.approx(loss, abs=0.1)
    seen, unseen = scores["seen"], scores["unseen"]
    assert [item["written"] for item in seen["examples"]] == list(CAPTIONS)
    assert seen["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert seen["CIDEr"] == pytest.approx(1000, rel=1e-3)  # its maximum is 10
    assert seen["wrong_images"]["BLEU-4"] < 5
    assert len({item["written"] for item in unseen["examples"]}) == 1
    assert unseen["CIDEr"] < 200
    assert unseen["test_loss"] > seen["test_loss"] + 0.2
    assert same(before, weights(opened))


def test_the_own_writers_loss_is_that_of_the_plain_model(opened: LoadedModel) -> None:
    """Pre-trained weights, and the sum over all tokens from logits that are written out."""
    pretrained = [p.detach() for p in opened.model.language.parameters()]
    config = replace(CAPTION, language_model="pretrained", freeze_language_model=True)
    writer: Any = captions.make_writer(opened, config, pretrained)
    assert not any(p.requires_grad for p in writer.parameters())
    assert same([*pretrained], [p.detach() for p in writer.language.parameters()])
    latents = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    ids = writer.ids(CAPTIONS[:2])
    assert [row[-1] for row in ids] == [opened.tokenizer().eos] * 2
    expected = 0.0
    for i, row in enumerate(ids):
        hidden, _ = writer._hidden(latents[i : i + 1], [row])
        logits = writer.language.norm_final(hidden) @ writer.language.head_weight[:306].T
        steps = range(len(writer.prompt) - 1, len(writer.prompt) + len(row) - 1)
        expected -= sum(float(logits[s].detach().log_softmax(0)[t]) for s, t in zip(steps, row, strict=True))
    assert writer.loss_sum(latents, ids).item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def local_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM of Hugging Face's making with random weights."""
    from corpora import small_tokenizer
    from lcl_mcore.distributed.cpu import make_torchvision_importable

    make_torchvision_importable()
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    small_tokenizer().save(folder / "raw.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"), eos_token="</s>", bos_token="<s>"
    )
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_hugging_face_lm_reads_latents_like_tokens(opened: LoadedModel, local_lm: Path) -> None:
    """Latents that are the embeddings of tokens give the loss and the continuation of those tokens."""
    config = replace(CAPTION, language_model=str(local_lm))
    writer: Any = captions.make_writer(opened, config, None)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    latents = writer.model.get_input_embeddings()(tokens)
    ids = writer.ids(["red cat", "the old house by the tree"])
    assert [row[-1] for row in ids] == [writer.end] * 2
    begin, expected = writer.tokenizer.bos_token_id, 0.0
    for prefix, row in zip(tokens.tolist(), ids, strict=True):
        whole = torch.tensor([[begin, *prefix, *row]])
        loss = writer.model(
            input_ids=whole, labels=torch.where(torch.arange(whole.shape[1]) < 4, -100, whole)
        ).loss
        expected += loss.item() * len(row)
    assert writer.loss_sum(latents, ids).item() == pytest.approx(expected, rel=1e-5)
    greedy = writer.model.generate(
        torch.cat((torch.full((2, 1), begin), tokens), 1),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=writer.end,
    )[:, 4:]
    assert writer.write(latents, 6) == [
        text.strip() for text in writer.tokenizer.batch_decode(greedy, skip_special_tokens=True)
    ]
    connector = captions.make_connector(32, writer.width, 0)
    loss = captions.train_writer(
        writer, connector, vit(opened.model), coloured(2, 0), replace(config, steps=30, warmup=0.0)
    )
    assert loss < 3.0  # from log 302 = 5.7


def test_drop_path_grows_to_the_last_block_and_is_undone(opened: LoadedModel) -> None:
    vision, images = opened.model.vision, coloured(1, 0).fetch(range(8))
    vision.train()
    with drop_path(vision, 0.5):
        rates = [layer.mlp_bda.drop_path for layer in vision.blocks.layers]
        one, two, again = (vit(opened.model).encode(images, seed) for seed in (1, 2, 1))
    vision.eval()
    assert rates == [0.0, 0.5]
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert [layer.mlp_bda.drop_path for layer in vision.blocks.layers] == [0.0, 0.0]


def test_both_splits_of_one_file(tmp_path: Path) -> None:
    """Karpathy's file holds both: the command line picks training and test pairs from it."""
    for n in range(3):
        Image.fromarray(np.full((32, 32, 3), 50 * n, np.uint8)).save(tmp_path / f"{n}.png")
    images = [
        {"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"caption {n}"}]}
        for n, split in enumerate(("test", "train", "restval"))
    ]
    file = tmp_path / "k.json"
    file.write_text(json.dumps({"images": images}))
    opened = SimpleNamespace(config=SimpleNamespace(model=SHAPE))
    words = ["retrieval", "m", "--data", str(file), "--train", str(file)]
    train, test = _both_pairs(parse([*words, "--train-split", "train,restval"]), opened, 0)
    assert (list(train.captions), list(test.captions)) == ([("caption 1",), ("caption 2",)], [("caption 0",)])
    assert train.fetch([1]).unique().tolist() == [100]
    assert len(_both_pairs(parse(words), opened, 0)[0]) == 1
    with pytest.raises(ConfigError, match="must not be the test pairs"):
        _both_pairs(parse([*words, "--train-split", "test"]), opened, 0)


def test_what_is_refused(opened: LoadedModel) -> None:
    def settings(*words: str) -> dict[str, Any] | None:
        flags: argparse.Namespace = parse(["retrieval", "runs/x", "--data", "d", *words])
        return transfer_settings(flags)

    assert settings() is None
    assert settings("--train", "t", "--lr", "0.1") == {"transfer": "frozen", "lr": 0.1}
    assert settings("--train", "t", "--transfer", "full") == {"transfer": "full"}
    for words, message in (
        (("--transfer", "full"), "new parts learn from pairs"),
        (("--train", "t", "--transfer", "zeroshot"), "zero-shot trains nothing"),
        (("--steps", "3"), r"--steps without a transfer: zero-shot trains nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(*words)
    with pytest.raises(ConfigError, match="must not be the test pairs"):
        check_apart(coloured(1, 0), coloured(1, 0), same_file=True)
    check_apart(coloured(1, 0), coloured(1, 0), same_file=False)
    with pytest.raises(ValueError, match="cannot write"):
        CaptionConfig(freeze_language_model=True)
    with pytest.raises(ValueError, match=r"transfer\.steps = 0: must be positive"):
        PairsConfig(steps=0)
    with pytest.raises(ConfigError, match=r"LM has 48 positions\. Use --text-tokens 41"):
        captions.make_writer(opened, CaptionConfig(), None)
    with pytest.raises(ConfigError, match="is neither fresh, pretrained nor a folder"):
        captions.make_writer(opened, CaptionConfig(language_model="nowhere"), None)
    with pytest.raises(ConfigError, match=r"cannot be loaded .* It needs config\.json"):
        captions.make_writer(opened, CaptionConfig(language_model=str(opened.folder)), None)
    broken = Encoder(
        32, lambda images, seed: torch.full((len(images), 4, 32), torch.inf), torch.device("cpu")
    )
    with pytest.raises(NonFiniteError, match="diverged"):
        towers.train_towers(make_towers(opened, 32), broken, coloured(1, 0), replace(RETRIEVAL, steps=1))
