"""Probes with chosen settings: against the plain formula, on features whose answers are known, and their warnings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.errors import ConfigError, NonFiniteError
from lcl_mcore.evaluation import attention_probe, probes
from lcl_mcore.evaluation.attention_probe import AttentionProbe, chosen_attention_probe
from lcl_mcore.evaluation.classification import probe_table, protocol, summarise
from lcl_mcore.evaluation.probes import (
    LabelledFeatures,
    logistic_regression,
    nearest_neighbours,
    seed_interval,
    standardise,
    validation_part,
    wilson_interval,
)


def clouds(count: int, seed: int, *, distance: float = 1.5, width: int = 8, classes: int = 3) -> LabelledFeatures:
    """Round clouds around one corner for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    vectors = torch.randn(count, width, generator=generator)
    vectors[torch.arange(count), labels] += distance
    return LabelledFeatures(vectors, labels)


def test_intervals() -> None:
    """Wilson's for 8 of 10, 0 and all of 20 (Newcombe 1998 has such tables); Student's for three values."""
    assert wilson_interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson_interval(20, 20) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    low, high = seed_interval([0.7, 0.8, 0.9])
    assert (low + high) / 2 == pytest.approx(0.8)
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 9))
def test_the_validation_part_takes_some_of_each_class_and_never_the_last(labels: list[int], seed: int) -> None:
    numbers = torch.tensor(labels)
    fit, held = validation_part(numbers, seed)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        assert int((numbers[held] == label).sum()) == (0 if count == 1 else max(int(0.2 * count), 1))
    again = validation_part(numbers, seed)
    assert torch.equal(again[0], fit)


def test_logistic_regression_is_the_minimum_of_the_plain_formula() -> None:
    """Its accuracies at the chosen penalty are those of the objective minimised in fp64."""
    train, test = clouds(300, 0), clouds(4000, 1)
    found = logistic_regression(train, test, 3, seed=0)
    assert found["converged"]
    assert found["warnings"] == []
    x, y = (z.double() for z in standardise(train.vectors, test.vectors))
    weight, bias = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, train.labels)
        loss = loss + 0.5 * found["chosen"]["penalty"] * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        right = [(z @ weight.T + bias).argmax(1) == t.labels for z, t in ((y, test), (x, train))]
    assert found["top1"] == pytest.approx(float(right[0].double().mean()), abs=1e-3)
    assert found["train_top1"] == pytest.approx(float(right[1].double().mean()), abs=1e-6)
    # The Bayes rule (the largest of three coordinates) is hardly better.
    bayes = float((test.vectors[:, :3].argmax(1) == test.labels).double().mean())
    assert bayes - 0.04 < found["top1"] < bayes + 0.01


def test_logistic_regression_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clouds(200, 0), clouds(100, 1)
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    found = logistic_regression(train, test, 3, seed=0)
    assert not found["converged"]
    assert found["warnings"][-1] == "not converged after 2 iterations: more would still change it"
    monkeypatch.undo()
    monkeypatch.setattr(probes, "PENALTIES", (1e-6, 1e-7))
    assert "is at the edge" in logistic_regression(train, test, 3, seed=0)["warnings"][0]
    monkeypatch.undo()
    single = LabelledFeatures(torch.eye(3), torch.arange(3))
    found = logistic_regression(single, single, 5, seed=0)  # one image per class, two classes without any
    assert (found["top1"], found["train_top1"]) == (1.0, 1.0)
    assert found["warnings"] == ["no class has two training images: the penalty 0.3 was not chosen"]
    two = LabelledFeatures(torch.eye(2), torch.tensor([0, 3]))
    assert logistic_regression(two, two, 5, seed=0)["top1"] == 1.0
    constant = LabelledFeatures(torch.ones(200, 4), train.labels)
    found = logistic_regression(constant, constant, 3, seed=0)  # a collapsed encoder: the most frequent class
    assert found["top1"] == pytest.approx(float(train.labels.bincount().max()) / 200)
    broken = LabelledFeatures(torch.full((200, 4), torch.nan), train.labels)
    for probe in (logistic_regression, nearest_neighbours):
        with pytest.raises(NonFiniteError):
            probe(broken, test, 3, 0)


@pytest.mark.parametrize("count", [40, 6])
def test_neighbours_vote_by_similarity(count: int) -> None:
    """Against a loop over images; a training image does not vote for itself; fewer images than neighbours."""
    train, test = clouds(count, 0, distance=1.0), clouds(30, 1, distance=1.0)
    found = nearest_neighbours(train, test, 3, seed=0)

    def vote(query: Tensor, skipped: int | None) -> int:
        similar = [
            (float(F.cosine_similarity(query, known, dim=0)), int(label))
            for i, (known, label) in enumerate(zip(train.vectors, train.labels, strict=True))
            if i != skipped
        ]
        votes = [0.0] * 3
        for cosine, label in sorted(similar, reverse=True)[:10]:
            votes[label] += math.exp(cosine / 0.07)
        return votes.index(max(votes))

    expected = [vote(query, None) for query in test.vectors]
    assert found["top1"] == pytest.approx(sum(e == t for e, t in zip(expected, test.labels, strict=True)) / 30)
    own = [vote(query, i) for i, query in enumerate(train.vectors)]
    assert found["train_top1"] == pytest.approx(sum(e == t for e, t in zip(own, train.labels, strict=True)) / count)


def tokens_with_a_hint(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The class is written on one of five tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    tokens = torch.randn(count, 5, 16, generator=generator)
    tokens[:, 2, :4] = 2 * torch.eye(4)[labels]
    tokens[:, 2, 8] = 4
    return tokens, labels


def test_the_attention_probe_trains_until_it_gains_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_probe, "FIRST_STEPS", 20)
    monkeypatch.setattr(attention_probe, "RATES", (1e-4, 3e-4))
    (tokens, labels), (unseen, answers) = tokens_with_a_hint(300, 0), tokens_with_a_hint(200, 1)

    def run() -> dict[str, Any]:
        return chosen_attention_probe(
            lambda: AttentionProbe(16, 2, 4, seed=0),
            lambda i: (tokens[i], labels[i]),
            labels,
            lambda i: (unseen[i], answers[i]),
            200,
            seed=0,
        )

    found = run()
    assert found["converged"]
    assert found["warnings"] == []
    assert found["top1"] > 0.95
    assert found["chosen"]["lr"] > 1e-3  # far beyond the rates that it was offered first
    monkeypatch.setattr(attention_probe, "HIGHEST_RATE", 5e-4)
    monkeypatch.setattr(attention_probe, "MOST_STEPS", 40)
    found = run()
    assert not found["converged"]
    assert found["warnings"] == [
        "the chosen rate 0.0003 is at the edge of what was tried",
        "not converged after 40 steps: more would still raise it",
    ]
    assert found["top1"] < 0.9


def test_which_protocol_is_asked_for() -> None:
    assert protocol(ProbeConfig(), 100_000) == "chosen"
    assert protocol(ProbeConfig(), 100_001) == "paper"
    assert protocol(ProbeConfig(probe="chosen"), 2_000_000) == "chosen"
    assert protocol(ProbeConfig(probe="paper"), 10) == "paper"
    assert protocol(ProbeConfig(epochs=3), 10) == "paper"
    assert protocol(ProbeConfig(transfer="full"), 10) == "paper"
    for config, told in (
        (
            ProbeConfig(probe="chosen", lr=0.1),
            "--lr with --probe chosen: is chosen by validation. Leave it out, or use --probe paper with --lr.",
        ),
        (
            ProbeConfig(probe="chosen", transfer="full"),
            "--probe chosen: is for frozen encoders. Remove --transfer full.",
        ),
        (ProbeConfig(probe="paper", seeds=3), "--seeds 3: needs --probe chosen. Repeat with --seed instead."),
    ):
        with pytest.raises(ConfigError) as refused:
            protocol(config, 10)
        assert str(refused.value) == told


def test_seeds_are_summarised_and_the_table_is_narrow() -> None:
    def run(top1: float) -> dict[str, Any]:
        numbers = {
            "top1": top1,
            "top1_interval": [top1 - 0.1, top1 + 0.1],
            "train_top1": 0.9,
            "converged": top1 > 0.5,
            "chosen": {"lr": 0.003, "steps": 19200, "batch_size": 256},
            "warnings": [] if top1 > 0.5 else ["still gaining"],
        }
        return {"probes": {"logistic regression, mean tokens": numbers}, "effective_rank": {"mean tokens": 4.0}}

    found = summarise([run(0.4), run(0.6), run(0.8)])
    numbers = found["probes"]["logistic regression, mean tokens"]
    assert (numbers["top1"], numbers["converged"]) == (pytest.approx(0.6), False)
    assert numbers["seed_interval"] == pytest.approx([0.6 - 0.4968, 0.6 + 0.4968], abs=1e-3)
    assert numbers["warnings"] == ["seed 0: still gaining"]
    table = probe_table({"probe": {"seeds": 3}, "trained": found, "random_init": found})
    assert max(map(len, table)) <= 100
    assert table[1] == (
        "trained     logistic regression, mean tokens 0.600  0.103 to 1.097  0.900  NO     lr 3.0e-03 x 19200"
    )
