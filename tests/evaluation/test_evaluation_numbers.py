"""Scores, ranks, readers and generation on inputs whose answers are known."""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_mcore.commands.evaluate import ClassifyOptions, HeldoutOptions, parse_options
from lcl_mcore.config.base import from_dict
from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.config.schema import EvaluationConfig
from lcl_mcore.errors import ConfigError, DataError
from lcl_mcore.evaluation.attention_probe import AttentionProbe, fit_classifier, top1
from lcl_mcore.evaluation.caption_data import open_caption_dataset
from lcl_mcore.evaluation.captioning import scores, words
from lcl_mcore.evaluation.classification_data import open_splits
from lcl_mcore.evaluation.embedding_metrics import effective_rank, mean_cosine, recall_at
from lcl_mcore.evaluation.heldout import HeldoutResult, PairEmbeds
from lcl_mcore.evaluation.heldout_report import write_report
from lcl_mcore.evaluation.retrieval import retrieval_scores
from lcl_mcore.evaluation.transfer import Fit, convergence_warnings, share_lost
from lcl_mcore.lr_schedule import cosine_with_warmup


def jpeg(level: int) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), level, np.uint8)).save(stored, "PNG")
    return stored.getvalue()


def test_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(5000, 16, generator=generator)
    assert effective_rank(cloud) == pytest.approx(16, rel=0.01)
    assert effective_rank(cloud[:, :1] * torch.ones(1, 16)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(cloud[:, :3] @ torch.eye(16)[:3]) == pytest.approx(3, rel=0.01)
    assert effective_rank(torch.ones(10, 4)) == 0.0
    unit = torch.nn.functional.normalize(cloud, dim=1)
    assert mean_cosine(unit) == pytest.approx(float((unit @ unit.T).fill_diagonal_(0).sum() / (5000 * 4999)), abs=1e-6)
    assert mean_cosine(torch.ones(7, 4) / 2) == pytest.approx(1.0)


def test_recall_of_pairs_and_of_nothing() -> None:
    similar = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    recall = recall_at(similar, similar[[1, 1, 2]], (1, 2))
    # Captions 0 and 1 are the same vector: each ties with the other for images 0 and 1.
    assert recall.image_to_text == {1: 1 / 3, 2: 1.0}
    assert recall.text_to_image == {1: 2 / 3, 2: 1.0}
    assert (recall.images, recall.mean(1)) == (3, 0.5)
    nothing = recall_at(torch.zeros(0, 2), torch.zeros(0, 2), (1,))
    assert nothing.images == 0
    assert math.isnan(nothing.mean(1))


def test_recall_with_several_captions() -> None:
    """Captions 0 to 2 are right; 3 to 5 belong to an image and look like another one: ties count against."""
    text = torch.cat((torch.eye(3), torch.eye(3)[[1, 2, 0]]))
    owner = torch.tensor([0, 1, 2, 0, 1, 2])
    found = retrieval_scores(torch.eye(3), text, owner, (1, 2, 3))
    assert found == {"TR@1": 0.0, "TR@2": 1.0, "TR@3": 1.0, "IR@1": 0.5, "IR@2": 0.5, "IR@3": 1.0}
    assert retrieval_scores(torch.eye(3), torch.eye(3), torch.arange(3), (1,)) == {"TR@1": 1.0, "IR@1": 1.0}


def test_caption_scores() -> None:
    references = [["A dog on the mat."], ["Two cats, sleeping together"], ["a red bus in the rain"]]
    assert words("A  dog, on_the Mat!") == "a dog on the mat"
    perfect = scores([r[0].upper() for r in references], references)
    assert perfect["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert perfect["CIDEr"] == pytest.approx(1000, rel=1e-3)  # its maximum is 10
    wrong = scores([r[0] for r in references[1:] + references[:1]], references)
    assert wrong["BLEU-4"] < 1
    assert wrong["CIDEr"] < 50


def test_labelled_readers_agree(tmp_path: Path) -> None:
    """A folder of classes, a tar per class and webdataset tars hold the same images."""
    levels = {"cat": (10, 60), "dog": (200,)}
    for split in ("train", "val"):
        folder, tars, samples = (tmp_path / "folder" / split, tmp_path / "tars" / split, tmp_path / "web" / split)
        for place in (tars, samples):
            place.mkdir(parents=True)
        with tarfile.open(samples / "shard-0.tar", "w") as web:
            for number, (name, values) in enumerate(levels.items()):
                (folder / name).mkdir(parents=True)
                with tarfile.open(tars / f"{name}.tar", "w") as tar:
                    for value in values:
                        content = jpeg(value)
                        (folder / name / f"{value}.png").write_bytes(content)
                        for target, key in ((tar, f"{value}.png"), (web, f"{name}{value}.png")):
                            entry = tarfile.TarInfo(key)
                            entry.size = len(content)
                            target.addfile(entry, io.BytesIO(content))
                        label = tarfile.TarInfo(f"{name}{value}.cls")
                        label.size = 1
                        web.addfile(label, io.BytesIO(str(number).encode()))
    for kind in ("folder", "tars", "web"):
        for data in open_splits(tmp_path / kind, 16):
            assert data.labels.tolist() == [0, 0, 1], kind
            assert data.classes == (("0", "1") if kind == "web" else ("cat", "dog"))
            pixels = data.fetch([2, 0, 1])
            assert pixels.shape == (3, 3, 16, 16)
            assert pixels.float().mean((1, 2, 3)).tolist() == [200, 10, 60]
            assert data.numbered == (kind == "web")
    part = open_splits(tmp_path / "folder", 16)[0].subset(2, seed=1)
    assert part.fetch([0, 1]).shape == (2, 3, 16, 16)
    (tmp_path / "folder" / "train" / "dog" / "200.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"200\.png: cannot be decoded"):
        open_splits(tmp_path / "folder", 16)[0].fetch([2])
    with pytest.raises(DataError, match="has no train split"):
        open_splits(tmp_path / "nothing", 16)


def test_caption_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(jpeg(90))
    karpathy = {
        "images": [
            {"filename": "a.png", "filepath": "", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
            {"filename": "b.png", "split": "train", "sentences": [{"raw": "three"}]},
        ]
    }
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    data = open_caption_dataset(str(tmp_path / "k.json"), None, "test", 0, 16)
    assert data.captions == (("one", "two"),)
    assert data.fetch([0]).unique().tolist() == [90]
    nocaps = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "a.png"}],
        "annotations": [{"image_id": i, "caption": text} for i, text in ((7, "x"), (8, "y"), (7, "z"))],
    }
    (tmp_path / "n.json").write_text(json.dumps(nocaps))
    assert open_caption_dataset(str(tmp_path / "n.json"), tmp_path, None, 0, 16).captions == (("x", "z"), ("y",))
    assert len(open_caption_dataset(str(tmp_path / "n.json"), tmp_path, None, 1, 16)) == 1
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: is not there"):
        open_caption_dataset(str(tmp_path / "n.json"), tmp_path, None, 0, 16)
    with pytest.raises(DataError, match="neither a prepared data set nor a caption file"):
        open_caption_dataset(str(tmp_path / "b.png"), None, "test", 0, 16)


def test_probe_learns_where_to_look() -> None:
    """The class is written on one of five tokens, which the pool must find; a mean over tokens is uninformative."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    tokens = torch.randn(400, 5, 16, generator=generator)
    tokens[:, 2, :4] = 4 * torch.eye(4)[labels]
    tokens[:, 2, 8] = 6
    config = ProbeConfig(epochs=40, batch_size=100, lr=1e-2)
    probe = AttentionProbe(16, 2, 4, seed=0)
    fit = fit_classifier(probe, [(list(probe.parameters()), 1.0)], lambda i: (tokens[i], labels[i]), 300, config)
    assert fit.loss < 0.2
    short = AttentionProbe(16, 2, 4, seed=0)
    brief = fit_classifier(
        short,
        [(list(short.parameters()), 1.0)],
        lambda i: (tokens[i], labels[i]),
        300,
        replace(config, epochs=8, lr=1e-3),
    )
    assert not brief.converged
    assert brief.falling > 0.02
    assert top1(probe, lambda i: (tokens[300 + i], labels[300 + i]), 100) > 0.95
    factors = [cosine_with_warmup(step, 100, 10, peak=1.0) for step in range(100)]
    assert factors[9] == 1.0
    assert factors[0] == pytest.approx(0.1)
    assert factors[99] < 0.001


def test_whether_a_loss_still_falls() -> None:
    assert share_lost(torch.tensor([9.0, 9.0, 4.0, 4.0, 3.0, 3.0, 0.0, 0.0])) == 0.25
    assert share_lost(torch.tensor([5.0, 2.0, 1.0, 1.0, 0.0])) == pytest.approx(0.5)
    assert share_lost(torch.zeros(8)) == 0.0
    assert share_lost(torch.ones(3)) == 1.0
    assert Fit(0.3, 0.019).converged
    assert Fit(0.009, 0.5).converged
    assert not Fit(0.3, 0.021).converged
    falling = {"trained": {"top1": 0.5, **Fit(0.3, 0.25).facts()}, "pixels": {"linear": Fit(0.3, 0.0).facts()}}
    assert convergence_warnings(falling) == [
        "trained has not converged: its training loss still fell by 25% between the second and third quarter of its "
        "steps. More steps would lower it further."
    ]
    assert convergence_warnings({"trained": Fit(0.3, share_lost(torch.ones(3))).facts()}) == [
        "trained has not converged: its training loss was seen in fewer than four steps. More steps would lower it "
        "further."
    ]


def test_the_report_escapes_what_it_shows(tmp_path: Path) -> None:
    """Captions come from data sets; two images are nearest to each other's caption."""
    texts = ("<script>alert(1)</script> & one", "two")
    embeds = PairEmbeds(torch.eye(2), torch.eye(2), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    numbers = {f"{prefix}R@{k}": 0.25 for prefix in ("", "image_to_text_", "text_to_image_") for k in (1, 5)}
    summary = {
        "run": "runs/<x>",
        "steps": 3,
        "images_seen": 12,
        "heldout": "data/heldout",
        "hardware": "a CPU",
        "candidates": 2,
        "retrieval": {"trained": numbers, "untrained": numbers, "chance": {"R@1": 0.5, "R@5": 1.0}},
        "r5_over_chance": 0.25,
        "generation": {"right": 1.0, "shuffled": 2.0, "none": 3.0},
    }
    records = [{"step": i, "loss": 2.0, "contrastive": 1.0, "generation": 1.0, "lr": 0.1} for i in (1, 2)]
    write_report(tmp_path / "report.json", HeldoutResult(summary, embeds, texts), records)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; one") == 2
    assert page.count('<span class="own">') == 2
    assert page.count("data:image/png;base64,") == 2
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "<h1>runs/&lt;x&gt;</h1>" in page
    assert "<tr><td>chance</td><td>0.500</td><td>1.000</td></tr>" in page
    assert "<tr><td>with a blank image</td><td>3.000</td></tr>" in page
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {
        **summary,
        "curves": [{"step": i, "loss": 2.0, "contrastive": 1.0, "generation": 1.0} for i in (1, 2)],
    }


def test_settings_and_command_lines_are_checked() -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(EvaluationConfig, {"every": 10})
    assert str(refused.value) == (
        "evaluation.every = 10 without evaluation.data: there is nothing to evaluate on. "
        "Give a prepared held-out data set."
    )
    classify = ["classify", "runs/demo", "--data", "x"]
    with pytest.raises(ConfigError) as caught:
        parse_options([*classify, "--lr", "0"])
    assert str(caught.value) == "--lr 0: must be positive. For example 0.0001."
    assert parse_options(["runs/demo", "--data", "x"]) == HeldoutOptions(model=Path("runs/demo"), data="x")
    options = parse_options([*classify, "--transfer", "full", "--lr", "0.1"])
    assert isinstance(options, ClassifyOptions)
    assert options.probe == ProbeConfig(transfer="full", lr=0.1)
