#!/usr/bin/env python
"""The demo: OpenMoji images to a trained vision encoder, in minutes, on whatever this machine has.

Builds the corpus, pre-trains on two processes (one per GPU where there are GPUs), evaluates on held-out
concepts and writes runs/demo/report.html. Interrupted at any moment, it continues when started again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS, RUN = Path("data/demo"), Path("runs/demo")


def processes() -> int:
    """Two on CPU; one per GPU up to eight."""
    import torch

    gpus = torch.cuda.device_count()
    return min(gpus, 8) if gpus else 2


def torchrun(count: int, *arguments: str) -> list[str]:
    """Command line of a job on this machine, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, *arguments]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(ROOT)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    corpus = [sys.executable, "tools/build_demo_corpus.py", str(CORPUS), "--quiet"]
    train = torchrun(
        processes(),
        "tools/pretrain_lcl.py",
        "--recipe",
        "demo",
        "--data",
        str(CORPUS / "train"),
        "--tokenizer",
        str(CORPUS),
        "--out",
        str(RUN),
        "--resume",
    )
    evaluate = [sys.executable, "tools/evaluate.py", str(RUN), "--data", str(CORPUS / "heldout")]
    for title, command in (
        ("1/3  building the corpus", corpus),
        ("2/3  pre-training", train),
        ("3/3  evaluating on held-out concepts", evaluate),
    ):
        print(f"\n=== {title}: {' '.join(command[1:])}", flush=True)
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            print(f"error: `{' '.join(command)}` ended with code {code}; see its message above.", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
