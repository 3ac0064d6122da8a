#!/usr/bin/env python
"""Real interleaved documents: HTML pages with images, sequences of 2048 tokens.

Fetches scikit-image's documentation (a Debian package, not installed; --packages takes more), turns its
pages into documents, holds a tenth of them out (none shares an image with the others), learns a vocabulary
on the rest, and pre-trains a small model on two processes; data/interleaved/heldout is for evaluation. Each
stage that is already done is skipped, so an interrupted run continues. Needs `apt-get download`; give a
folder of HTML pages instead with --pages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS, RUN = Path("data/interleaved"), Path("runs/interleaved")


def call(*arguments: str) -> None:
    """Run one stage; its message has been printed if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    code = subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode
    if code:
        sys.exit(code)


def learn_vocabulary() -> Path:
    """`tokenizer.json` from the texts of the training documents."""
    from lcl_mcore.data.format import NativeDataset
    from lcl_mcore.data.tokenizer import train_bpe

    path = CORPUS / "tokenizer.json"
    if not path.exists():
        data = NativeDataset(str(CORPUS / "train"))
        texts = (text for i in range(len(data)) for text in data.document(i)[0].texts)
        part = path.with_suffix(".part")
        train_bpe(texts, 8000).save(part)
        part.replace(path)
        data.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", nargs="+", default=["python-skimage-doc"], help="see tools/fetch_corpora.py")
    parser.add_argument("--pages", type=Path, help="folder of HTML pages with images (default: fetched)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    pages = args.pages.resolve() if args.pages else None
    os.chdir(ROOT)
    if pages is None:
        call("tools/fetch_corpora.py", str(CORPUS / "packages"), *args.packages)
        pages = CORPUS / "packages"
    call("tools/prepare_data.py", "html", str(pages), str(CORPUS / "all"), "--max-repeats", "30")
    call("tools/prepare_data.py", "split", str(CORPUS / "all"), str(CORPUS), "--heldout-share", "0.1")
    tokenizer = learn_vocabulary()
    call(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.processes),
        "tools/pretrain_lcl.py",
        "--recipe",
        "demo",
        "--data",
        str(CORPUS / "train"),
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(RUN),
        "--resume",
        "--steps",
        str(args.steps),
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "4",
        "--log-every",
        "1",
        "--set",
        "data.sequence_length=2048",
        "model.language.max_positions=2048",
        "model.language.vocab_size=8192",
        "optim.warmup_steps=10",
    )


if __name__ == "__main__":
    main()
