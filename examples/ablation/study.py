"""The runs of the ablation (paper Table 6): settings, seeds, and one run from its start to its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import write_config
from lcl_mcore.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 2000


@dataclass(frozen=True)
class Setting:
    """Weights of the two losses. `contrastive only` and `generation only` give the other one no weight."""

    name: str
    contrastive: float
    generation: float


SETTINGS = (
    Setting("contrastive only", 1.0, 0.0),
    Setting("generation only", 0.0, 1.0),
    Setting("both, 0.05", 0.05, 1.0),
    Setting("both, 0.1", 0.1, 1.0),
    Setting("both, 0.2", 0.2, 1.0),
    Setting("both, 0.5", 0.5, 1.0),
)


@dataclass(frozen=True)
class Budget:
    """What every run gets.

    Attributes:
        steps: optimizer steps of 4 sequences of 512 tokens.
        probe_images: for training and for testing the probe.
        probe_epochs: passes of the probe over its training images.
    """

    steps: int
    probe_images: int
    probe_epochs: float
    seeds: int


FULL = Budget(steps=250, probe_images=4000, probe_epochs=12, seeds=3)


def config_of(setting: Setting, seed: int, corpus: Path, budget: Budget) -> RunConfig:
    """The demo's towers on sequences of 512 tokens, the same for every setting but for the weights."""
    base = load_recipe("demo")
    source = SourceConfig(path=str(corpus / "train"), max_images=24)
    language = replace(base.model.language, vocab_size=2048, max_positions=512)
    return replace(
        base,
        recipe="ablation",
        model=replace(base.model, language=language),
        data=DataConfig(
            sources=(source,),
            tokenizer=TokenizerConfig(kind="file", path=str(corpus)),
            sequence_length=512,
            decode_threads=1,
            decode_backend="cpu",
        ),
        loss=LossConfig(contrastive_weight=setting.contrastive, generation_weight=setting.generation),
        optim=OptimConfig(lr=1e-3, warmup_steps=max(budget.steps // 10, 1)),
        train=TrainConfig(steps=budget.steps, micro_batch_size=4, global_batch_size=4, seed=seed, device="cpu"),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(every=50, tensorboard=False),
    )


@dataclass(frozen=True)
class Study:
    """Where things are, and how much each run gets."""

    corpus: Path
    labelled: Path
    out: Path
    budget: Budget

    def folder(self, setting: Setting, seed: int) -> Path:
        return self.out / f"{setting.name.replace(', ', '-').replace(' ', '-')}-seed{seed}"

    def run_all(self, settings: tuple[Setting, ...], workers: int) -> list[dict[str, Any]]:
        """Every setting with every seed, and an untrained encoder per seed; finished ones are only read."""
        jobs = [(setting, seed) for seed in range(self.budget.seeds) for setting in settings]
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(self.run, *job, untrained=job[0] is settings[0]) for job in jobs]
            try:
                return [future.result() for future in waiting]
            except SystemExit:
                pool.shutdown(wait=False, cancel_futures=True)  # the runs under way end, no other begins
                raise

    def run(self, setting: Setting, seed: int, *, untrained: bool) -> dict[str, Any]:
        """Train, measure, and leave `result.json`; interrupted at any point, the next call continues.

        With `untrained`, the weights it started from are measured too: they are the same for every setting.
        """
        folder = self.folder(setting, seed)
        result = folder / "result.json"
        if not result.is_file():
            started = time.perf_counter()
            write_config(config_of(setting, seed, self.corpus, self.budget), folder / "wanted")
            call(
                "tools/pretrain_lcl.py",
                "--config",
                str(folder / "wanted" / "config.yaml"),
                "--out",
                str(folder),
                "--resume",
                log=folder / "train.log",
            )
            trained = time.perf_counter()
            extra = ["--untrained"] if untrained else []
            call(
                "examples/ablation/measure.py",
                str(folder),
                "--heldout",
                str(self.corpus / "heldout"),
                "--labelled",
                str(self.labelled),
                "--images",
                str(self.budget.probe_images),
                "--epochs",
                str(self.budget.probe_epochs),
                *extra,
                log=folder / "measure.log",
            )
            measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
            record = {
                "setting": setting.name,
                "contrastive": setting.contrastive,
                "generation": setting.generation,
                "seed": seed,
                **measured,
                "train_seconds": round(trained - started, 1),
                "measure_seconds": round(time.perf_counter() - trained, 1),
            }
            part = result.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            part.replace(result)
        record = json.loads(result.read_text(encoding="utf-8"))
        print(
            f"{setting.name:<18} seed {seed}  accuracy {record['trained']['frozen_accuracy']:.3f}  "
            f"R@5 {record['trained']['retrieval_R@5']:.3f}  gap {record['trained']['shuffle_gap']:+.4f}  "
            f"rank {record['trained']['effective_rank']:.1f}",
            flush=True,
        )
        return record


def call(*arguments: str, log: Path) -> None:
    """One thread per run: two runs side by side use two cores better than one run on both."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"error: `{' '.join(arguments)}` ended with code {code}; {log} ends with\n{tail}")
