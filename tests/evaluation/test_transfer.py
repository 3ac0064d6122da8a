"""Transfer with pairs: a corpus whose colours determine the captions, plain references, and what is refused."""

from __future__ import annotations

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

from lcl_mcore.commands.evaluate import RetrievalOptions, both_pairs, parse_options, transfer_settings
from lcl_mcore.config.base import from_dict
from lcl_mcore.config.evaluation import CaptionConfig, ProbeConfig, RetrievalConfig
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, TokenizerConfig, VisionConfig
from lcl_mcore.errors import ConfigError, NonFiniteError
from lcl_mcore.evaluation import attention_probe, captioning, retrieval
from lcl_mcore.evaluation.caption_data import CaptionDataset
from lcl_mcore.evaluation.classification import FrozenImages, classify, with_pixels, without_repeated_channels
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.probes import LabelledFeatures
from lcl_mcore.evaluation.transfer import ImageEncoder, drop_path, require_disjoint, vit

SHAPE = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=4, mlp_width=64),
    language=LanguageConfig(vocab_size=306, width=32, layers=2, heads=4, mlp_width=64, max_positions=48, dropout=0.1),
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
def loaded(build: Callable[..., Any], groups: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model with random weights, as if it had been loaded."""
    from corpora import small_tokenizer
    from lcl_mcore.distributed.device import pick_device

    folder = tmp_path_factory.mktemp("transfer")
    small_tokenizer().save(folder / "tokenizer.json")
    device, model = pick_device("cpu"), build(SHAPE, train=False)
    recipe = load_recipe("demo")
    data = replace(recipe.data, tokenizer=TokenizerConfig(kind="file", path=str(folder)), sequence_length=48)
    context: Any = SimpleNamespace(device=device, groups=groups, log=lambda line: None)
    state: Any = SimpleNamespace(step=0, images_seen=0)
    return LoadedModel(replace(recipe, model=SHAPE, data=data), model, context, folder, folder, state)


def constant(width: int) -> ImageEncoder:
    """Says the same of every image."""
    return ImageEncoder(width, lambda images, seed: torch.ones(len(images), 4, width), torch.device("cpu"))


def weights(loaded: LoadedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in loaded.model.vision.parameters()]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


RETRIEVAL = RetrievalConfig(steps=60, batch_size=16, lr=1e-2, chunk_size=16)


def make_dual_encoder(loaded: LoadedModel, width: int, config: RetrievalConfig = RETRIEVAL) -> retrieval.DualEncoder:
    return retrieval.DualEncoder(SHAPE, width, loaded.context, loaded.tokenizer(), config)


def test_the_text_feature_is_that_of_the_plain_model_at_the_last_token(loaded: LoadedModel) -> None:
    """Texts of unequal length in one call, against the reference model on one text at a time."""
    from batches import micro_batch
    from reference_model import ReferenceLcl

    dual, tokenizer = make_dual_encoder(loaded, 32), loaded.tokenizer()
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    state = loaded.model.state_dict() | {f"language.{k}": v for k, v in dual.language.state_dict().items()}
    reference = ReferenceLcl(SHAPE)
    reference.load_lcl_state({k: v for k, v in state.items() if v is not None})
    with torch.no_grad():
        found = dual.text_embeds(CAPTIONS[:3])
        for text, vector in zip(CAPTIONS, found, strict=False):
            ids = torch.tensor([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
            batch = replace(
                micro_batch(SHAPE, [[(3,)]]), tokens=ids, positions=torch.arange(len(ids)), lengths=(len(ids),)
            )
            hidden = reference.read(batch, torch.zeros(0, 4, 32))
            expected = reference.contexts(hidden, torch.tensor([len(ids) - 1]))[0]
            torch.testing.assert_close(vector, expected / expected.norm(), atol=2e-6, rtol=1e-5)
    assert float((found @ found.T).fill_diagonal_(0).abs().max()) < 0.999


def test_a_batch_in_parts_has_the_gradient_of_the_whole(loaded: LoadedModel) -> None:
    train, losses, gradients = coloured(2, 0), [], []
    before = weights(loaded)
    for chunk in (16, 5):
        dual = make_dual_encoder(loaded, 32)
        config = replace(RETRIEVAL, transfer="full", steps=1, batch_size=16, chunk_size=chunk, encoder_lr=1e-30)
        encoder = vit(loaded.model, full=True)
        losses.append(retrieval.train_dual_encoder(dual, encoder, train, config).loss)
        gradients.append([p.grad for p in [*dual.parameters(), *encoder.parameters] if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(gradients[0]) == len(gradients[1]) > 60
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6 + 1e-4 * float(whole.abs().max()), rtol=0)
    loaded.model.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(loaded.model.vision.parameters(), before, strict=True):
            parameter.copy_(value)


def test_retrieval_is_perfect_where_colours_are_seen_and_chance_where_not(loaded: LoadedModel) -> None:
    train, test, before = coloured(8, 0), coloured(1, 1), weights(loaded)
    dual, encoder = make_dual_encoder(loaded, 32), vit(loaded.model)
    loss = retrieval.train_dual_encoder(dual, encoder, train, RETRIEVAL).loss
    found = retrieval.score_dual_encoder(dual, encoder, test)
    assert (found["TR@1"], found["IR@1"]) == (1.0, 1.0)
    assert loss < 1.2  # log 16 is 2.8; two of a colour in a batch cannot be told apart
    assert same(before, weights(loaded))
    dual = make_dual_encoder(loaded, 32)
    retrieval.train_dual_encoder(dual, constant(32), train, RETRIEVAL)
    found = retrieval.score_dual_encoder(dual, constant(32), test)
    assert (found["TR@1"], found["IR@1"]) == (1 / 8, 0.0)  # ties count against a query


@pytest.mark.slow
def test_classification_with_chosen_probes(
    loaded: LoadedModel, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every probe beside its baselines, twice."""
    monkeypatch.setattr(attention_probe, "FIRST_STEPS", 10)
    monkeypatch.setattr(attention_probe, "MOST_STEPS", 40)
    result = classify(loaded, labelled, ProbeConfig(seeds=2))
    assert result["task"] == "classification, frozen transfer, chosen probes"
    vectors = {"trained": ("mean tokens", "pooled"), "random_init": ("mean tokens", "pooled"), "pixels": ("pixels",)}
    for name, features in vectors.items():
        found = result[name]["probes"]
        assert set(found) == {
            *(f"{kind}, {feature}" for kind in ("logistic regression", "nearest neighbours") for feature in features),
            "attention probe, tokens",
        }
        assert set(result[name]["effective_rank"]) == set(features)
        for probe, numbers in found.items():
            assert len(numbers["seeds"]) == 2
            assert 0 <= numbers["top1"] <= 1, probe
            assert numbers["seed_interval"][0] <= numbers["top1"] <= numbers["seed_interval"][1]
    assert result["pixels"]["probes"]["logistic regression, pixels"]["top1"] > 0.95
    # The fixture's weights are the random ones of the run's seed, so the first seed of the baseline is the encoder.
    own, baseline = (
        [seed["top1"] for seed in result[name]["probes"]["logistic regression, pooled"]["seeds"]]
        for name in ("trained", "random_init")
    )
    assert own[0] == baseline[0]
    assert result["random_init"]["effective_rank"] != result["trained"]["effective_rank"]
    for parameter, value in zip(loaded.model.vision.parameters(), weights(loaded), strict=True):
        assert torch.equal(parameter, value)
    reset_weights(loaded)


def test_pixels_are_the_image(loaded: LoadedModel) -> None:
    """Averaged to 32 pixels a side at most, in one channel where all images are grey."""
    encoder = with_pixels(loaded.model)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    seen = encoder.vectors["pixels"](encoder.encode(images, 0))
    torch.testing.assert_close(seen, images.float().flatten(1) / 255, atol=1e-5, rtol=0)
    grey, labels = seen.view(3, 3, -1)[:, :1].expand(-1, 3, -1).flatten(1), torch.zeros(3, dtype=torch.int64)
    for vectors, width in ((seen, 3072), (grey, 1024)):
        split = FrozenImages(lambda i: (i, i), {"pixels": LabelledFeatures(vectors, labels)}, labels)
        assert without_repeated_channels(split)[0].vectors["pixels"].vectors.shape == (3, width)


def test_full_transfer_moves_the_encoder_and_gives_it_back(loaded: LoadedModel) -> None:
    train, test, before = coloured(2, 0), coloured(1, 1), weights(loaded)
    moved: list[bool] = []
    config = replace(RETRIEVAL, transfer="full", steps=2, batch_size=8)
    original = retrieval.score_dual_encoder

    def watch(*arguments: Any) -> dict[str, float]:
        moved.append(not same(before, weights(loaded)))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "score_dual_encoder", watch)
        result = retrieval.retrieval_transfer(loaded, train, test, config, baselines=False)
        frozen = retrieval.retrieval_transfer(loaded, train, test, replace(config, transfer="frozen"))
    assert moved == [True, False, False, False]
    assert "random_init" not in result
    assert {"trained", "random_init", "pixels", "chance"} <= set(frozen)
    assert frozen["task"] == "retrieval, frozen transfer"
    assert frozen["training"]["steps"] == 2
    assert same(before, weights(loaded))  # the random weights of the run's seed are what the fixture has, too
    assert frozen["random_init"] == frozen["trained"]
    assert frozen["pixels"] != frozen["trained"]


CAPTION = CaptionConfig(steps=80, batch_size=8, lr=1e-2, chunk_size=6, text_tokens=30, warmup=0.1)


def test_captions_are_reproduced_where_colours_are_seen(loaded: LoadedModel) -> None:
    train, test, before = coloured(4, 0), coloured(1, 1), weights(loaded)
    scores = {}
    for name, encoder in {"seen": vit(loaded.model), "unseen": constant(32)}.items():
        decoder = captioning.make_decoder(loaded, CAPTION, None)
        connector = captioning.make_connector(encoder.width, decoder.width, 0)
        loss = captioning.train_decoder(decoder, connector, encoder, train, CAPTION).loss
        scores[name] = captioning.score_decoder(decoder, connector, encoder, test, 30)
        assert scores[name]["test_loss"] == pytest.approx(loss, abs=0.1)
    seen, unseen = scores["seen"], scores["unseen"]
    assert [item["written"] for item in seen["examples"]] == list(CAPTIONS)
    assert seen["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert seen["CIDEr"] == pytest.approx(1000, rel=1e-3)  # its maximum is 10
    assert seen["wrong_images"]["BLEU-4"] < 5
    assert len({item["written"] for item in unseen["examples"]}) == 1
    assert unseen["CIDEr"] < 200
    assert unseen["test_loss"] > seen["test_loss"] + 0.2
    assert same(before, weights(loaded))


def test_the_loss_of_the_runs_own_decoder_is_that_of_the_plain_model(loaded: LoadedModel) -> None:
    """Pre-trained weights, and the sum over all tokens from logits that are written out."""
    pretrained = [p.detach() for p in loaded.model.language.parameters()]
    config = replace(CAPTION, language_model="pretrained", freeze_language_model=True)
    decoder: Any = captioning.make_decoder(loaded, config, pretrained)
    assert not any(p.requires_grad for p in decoder.parameters())
    assert same([*pretrained], [p.detach() for p in decoder.language.parameters()])
    latents = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    ids = decoder.encode(CAPTIONS[:2])
    assert [text[-1] for text in ids] == [loaded.tokenizer().eos] * 2
    expected = 0.0
    for i, text in enumerate(ids):
        hidden, _ = decoder._hidden(latents[i : i + 1], [text])
        logits = decoder.language.norm_final(hidden) @ decoder.language.head_weight[:306].T
        steps = range(len(decoder.prompt) - 1, len(decoder.prompt) + len(text) - 1)
        expected -= sum(float(logits[s].detach().log_softmax(0)[t]) for s, t in zip(steps, text, strict=True))
    assert decoder.loss_sum(latents, ids).item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def local_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM of Hugging Face's making with random weights."""
    from corpora import small_tokenizer
    from lcl_mcore.distributed.cpu import make_torchvision_importable

    make_torchvision_importable()
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    small_tokenizer().save(folder / "raw.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "raw.json"), eos_token="</s>", bos_token="<s>")
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


def test_a_hugging_face_lm_reads_latents_like_tokens(loaded: LoadedModel, local_lm: Path) -> None:
    """Latents that are the embeddings of tokens give the loss and the continuation of those tokens."""
    config = replace(CAPTION, language_model=str(local_lm))
    decoder: Any = captioning.make_decoder(loaded, config, None)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    latents = decoder.model.get_input_embeddings()(tokens)
    ids = decoder.encode(["red cat", "the old house by the tree"])
    assert [text[-1] for text in ids] == [decoder.end] * 2
    begin, expected = decoder.tokenizer.bos_token_id, 0.0
    for prefix, text in zip(tokens.tolist(), ids, strict=True):
        whole = torch.tensor([[begin, *prefix, *text]])
        loss = decoder.model(input_ids=whole, labels=torch.where(torch.arange(whole.shape[1]) < 4, -100, whole)).loss
        expected += loss.item() * len(text)
    assert decoder.loss_sum(latents, ids).item() == pytest.approx(expected, rel=1e-5)
    greedy = decoder.model.generate(
        torch.cat((torch.full((2, 1), begin), tokens), 1), max_new_tokens=6, do_sample=False, pad_token_id=decoder.end
    )[:, 4:]
    assert decoder.generate(latents, 6) == [
        text.strip() for text in decoder.tokenizer.batch_decode(greedy, skip_special_tokens=True)
    ]
    connector = captioning.make_connector(32, decoder.width, 0)
    fit = captioning.train_decoder(
        decoder, connector, vit(loaded.model), coloured(2, 0), replace(config, steps=30, warmup=0.0)
    )
    assert fit.loss < 3.0  # from log 302 = 5.7


def test_the_baseline_has_the_weights_of_the_start(build: Callable[..., Any], loaded: LoadedModel) -> None:
    """Every one of them, layer scale included; the temperature plays no part in an evaluation."""
    shape = replace(SHAPE, vision=replace(SHAPE.vision, layer_scale=0.3))
    seed = loaded.config.train.seed
    model, start = build(shape, seed, noise=0.5), build(shape, seed)
    reset_weights(replace(loaded, config=replace(loaded.config, model=shape), model=model))
    checked = 0
    for (name, parameter), expected in zip(model.named_parameters(), start.parameters(), strict=True):
        if name != "temperature.log_scale":
            assert torch.equal(parameter, expected), name
            checked += name.endswith("gamma")
    assert checked == 4


def test_drop_path_grows_to_the_last_block_and_is_undone(loaded: LoadedModel) -> None:
    vision, images = loaded.model.vision, coloured(1, 0).fetch(range(8))
    vision.train()
    with drop_path(vision, 0.5):
        rates = [layer.mlp_bda.drop_path for layer in vision.blocks.layers]
        one, two, again = (vit(loaded.model).encode(images, seed) for seed in (1, 2, 1))
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
    loaded = SimpleNamespace(config=SimpleNamespace(model=SHAPE))

    def split(*words: str) -> tuple[CaptionDataset, CaptionDataset]:
        options = parse_options(["retrieval", "m", "--data", str(file), "--train", str(file), *words])
        assert isinstance(options, RetrievalOptions)
        return both_pairs(options, loaded, 0)

    train, test = split("--train-split", "train,restval")
    assert (list(train.captions), list(test.captions)) == ([("caption 1",), ("caption 2",)], [("caption 0",)])
    assert train.fetch([1]).unique().tolist() == [100]
    assert len(split()[0]) == 1
    with pytest.raises(ConfigError, match="must not be the test pairs"):
        split("--train-split", "test")


def test_what_is_refused(loaded: LoadedModel) -> None:
    def settings(*words: str) -> RetrievalConfig | None:
        options = parse_options(["retrieval", "runs/x", "--data", "d", *words])
        assert isinstance(options, RetrievalOptions)
        return transfer_settings(options, options.training)

    assert settings() is None
    assert settings("--train", "t", "--lr", "0.1") == RetrievalConfig(transfer="frozen", lr=0.1)
    assert settings("--train", "t", "--transfer", "full") == RetrievalConfig(transfer="full")
    for words, message in (
        (
            ("--transfer", "full"),
            "--transfer full without --train: a head learns from pairs. "
            "Give --train: a prepared data set, Karpathy's or COCO-style JSON.",
        ),
        (
            ("--train", "t", "--transfer", "zeroshot"),
            "--train without a transfer: zero-shot trains nothing. Use --transfer frozen or full.",
        ),
        (("--steps", "3"), "--steps without a transfer: zero-shot trains nothing. Give --train, or leave it out."),
        (("--train", "t", "--steps", "0"), "--steps 0: must be positive. For example 5000."),
    ):
        with pytest.raises(ConfigError) as caught:
            settings(*words)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match="must not be the test pairs"):
        require_disjoint(replace(coloured(1, 0), sources=["a", "b"]), replace(coloured(1, 0), sources=["b", "c"]))
    require_disjoint(coloured(1, 0), coloured(1, 0))
    with pytest.raises(ConfigError) as refused:
        from_dict(CaptionConfig, {"freeze_language_model": True})
    assert str(refused.value) == (
        "freeze_language_model with language_model = fresh: random weights that do not learn cannot write. "
        "Give --language-model pretrained or a folder, or let it learn."
    )
    with pytest.raises(ConfigError, match=r"LM has 48 positions\. Use --text-tokens 41"):
        captioning.make_decoder(loaded, CaptionConfig(), None)
    with pytest.raises(ConfigError, match="is neither fresh, pretrained nor a folder"):
        captioning.make_decoder(loaded, CaptionConfig(language_model="nowhere"), None)
    with pytest.raises(ConfigError, match=r"cannot be loaded .* It needs config\.json"):
        captioning.make_decoder(loaded, CaptionConfig(language_model=str(loaded.folder)), None)
    broken = ImageEncoder(32, lambda images, seed: torch.full((len(images), 4, 32), torch.inf), torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="diverged"):
        retrieval.train_dual_encoder(make_dual_encoder(loaded, 32), broken, coloured(1, 0), replace(RETRIEVAL, steps=1))
