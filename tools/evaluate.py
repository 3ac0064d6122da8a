#!/usr/bin/env python
"""Evaluate a run, a checkpoint of any layout, or an imported model. See docs/evaluation.md.

python tools/evaluate.py runs/demo --data data/demo/heldout
python tools/evaluate.py classify runs/demo --data data/packages/dataset-fashion-mnist/usr/share/datasets/fashion-mnist
python tools/evaluate.py {retrieval,caption} MODEL --data dataset_coco.json --images coco [--train PAIRS]
python tools/evaluate.py zeroshot MODEL --data imagenet --classnames names.txt
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.evaluate import main

if __name__ == "__main__":
    run_main(main)
