"""Data engine against a straight webdataset + Pillow pipeline, on the same files, in one run.

    python tools/fetch_corpora.py corpora opencv-doc
    python benchmarks/data.py corpora --output benchmarks/results/data-cpu.json

The photographs of the folder become one set of pairs. Every contender runs in a process of its own on
one thread, all of them in turn for several rounds; the median of a figure's rounds counts. `plain` decodes
with Pillow, takes a random resized crop, makes normalised floats, and puts one document in a sequence, as
open_clip and the released LCL code do; `ours` and `dali` are this loader, packing sequences, with its two decoders;
`ours-unpacked` and `dali-unpacked` put one document in a sequence as `plain` does, which makes them comparable.
`python` is ours without decode and resize: what each image costs beside them. Hashing and copies, which other
threads can do, are in it; most of the rest holds the interpreter's lock and bounds a process whatever its threads.
Rates are per second of CPU time, so that other load on the machine matters little.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTH, SIDE, LATENTS = 2048, 224, 196
PACKED_SEQUENCES, PLAIN_SEQUENCES = 8, 80  # about 80 documents either way
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONTENDERS = ("plain", "ours", "ours-unpacked", "dali", "dali-unpacked", "python")
# what is compared, which of our variants it is taken from, and whether more is better
FIGURES = {
    "images_per_cpu_second": ("", True),
    "sequences_per_cpu_second": ("-unpacked", True),
    "full_sequences_per_cpu_second": ("", True),
    "fill": ("", True),
    "peak_memory_mib": ("", False),
    "cpu_seconds_to_first_batch": ("", False),
    "seconds_to_first_batch": ("", False),
}


def make_set(photos: Path, work: Path) -> None:
    """Pairs from all JPEGs of a folder (named after their files), prepared; and a tokenizer."""
    from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
    from lcl_mcore.data.prepare.normalise import ImageLimits
    from lcl_mcore.data.prepare.pairs import PairReader
    from lcl_mcore.data.tokenizer import train_bpe

    words = []
    with tarfile.open(work / "photos.tar", "w") as tar:
        for n, path in enumerate(sorted(p for p in photos.rglob("*.jpg") if p.is_file())):
            caption = " ".join(path.stem.replace("-", "_").split("_")) * (1 + n % 5)
            words.append(caption)
            for name, content in ((f"{n:06d}.jpg", path.read_bytes()), (f"{n:06d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    options = PrepareOptions(limits=ImageLimits(min_side=200))
    prepare(PairReader(work / "photos.tar"), work / "set", options, workers=1, quiet=True)
    train_bpe(words, 2000).save(work / "tokenizer.json")


def plain(work: Path) -> Iterator[tuple[int, int, int]]:
    """The straight pipeline: images, sequences and used tokens of each batch."""
    import numpy as np
    import torch
    import webdataset
    from PIL import Image

    from lcl_mcore.config.schema import TokenizerConfig
    from lcl_mcore.data.crop import random_window
    from lcl_mcore.data.tokenizer import build_tokenizer
    from lcl_mcore.rng import KeyedRandom

    tokenizer = build_tokenizer(TokenizerConfig(path=str(work / "tokenizer.json")))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    shards = [str(path) for path in sorted((work / "set").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).shuffle(200).repeat()
    images, sequences, used = [], [], 0
    for sample in samples:
        name = next(name for name in sample if name.startswith("0."))
        image = Image.open(io.BytesIO(sample[name])).convert("RGB")
        window = random_window(*image.size, (0.9, 1.0), (0.75, 4 / 3), KeyedRandom(random.random().hex()))
        left, top = window.left, window.top
        cropped = image.crop((left, top, left + window.width, top + window.height))
        resized = cropped.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
        images.append((pixels - mean) / std)
        ids = tokenizer.encode(json.loads(sample["json"])["text_list"][0])
        sequence = torch.zeros(LENGTH, dtype=torch.int64)
        sequence[: len(ids)] = torch.tensor(ids)
        sequences.append(sequence)
        used += len(ids) + LATENTS + 4
        if len(sequences) == PLAIN_SEQUENCES:
            torch.stack(images), torch.stack(sequences)
            yield PLAIN_SEQUENCES, PLAIN_SEQUENCES, used
            images, sequences, used = [], [], 0


def ours(work: Path, backend: str, *, packed: bool) -> Iterator[tuple[int, int, int]]:
    """This loader: images, sequences and used tokens of each step."""
    from lcl_mcore.config.schema import DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainConfig
    from lcl_mcore.data.loader import DataContext, build_loader
    from lcl_mcore.data.tokenizer import build_tokenizer

    data = DataConfig(
        sources=(SourceConfig(path=str(work / "set")),),
        tokenizer=TokenizerConfig(path=str(work / "tokenizer.json")),
        sequence_length=LENGTH,
        decode_backend=backend,  # type: ignore[arg-type]
        decode_threads=1,
        prefetch_steps=1,
        packing="best_fit" if packed else "off",
    )
    sequences = PACKED_SEQUENCES if packed else PLAIN_SEQUENCES
    config = RunConfig(  # ViT patches of 16 pixels: 14 x 14 = 196 latents for an image of 224
        data=data, train=TrainConfig(global_batch_size=sequences, micro_batch_size=sequences)
    )
    loader = build_loader(config, DataContext(), build_tokenizer(data.tokenizer))
    try:
        for step in loader:
            yield sum(step.counts.images), sequences, sum(step.counts.tokens)
    finally:
        loader.close()


def leave_out_decode_and_resize() -> None:
    """In this process, from now on: every image is a blank one."""
    import simplejpeg
    import torch

    from lcl_mcore.data import decode

    blank = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    simplejpeg.decode_jpeg = lambda *arguments, **options: None
    decode.reduction_for = lambda window, side: None
    decode.resize = lambda pixels, window, side: blank


def measure(name: str, work: Path, images: int) -> dict[str, Any]:
    """One contender in this process: warm up for a batch, then run until enough images came."""
    import torch

    torch.set_num_threads(1)
    if name == "python":
        leave_out_decode_and_resize()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    batches = (
        plain(work)
        if name == "plain"
        else ours(work, "dali" if "dali" in name else "cpu", packed="unpacked" not in name)
    )
    first_images = next(batches)[0]
    first, first_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    start, seen, sequences, tokens = time.process_time(), 0, 0, 0
    while seen < images:
        n, s, t = next(batches)
        seen, sequences, tokens = seen + n, sequences + s, tokens + t
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batches.close()  # type: ignore[attr-defined]
    return {
        "images_per_cpu_second": seen / seconds,
        "sequences_per_cpu_second": sequences / seconds,
        "full_sequences_per_cpu_second": tokens / LENGTH / seconds,
        "fill": tokens / sequences / LENGTH,
        "peak_memory_mib": memory,
        "seconds_to_first_batch": first,
        "cpu_seconds_to_first_batch": first_cpu,
        "images_in_first_batch": first_images,
    }


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Figure by figure."""
    return {name: round(statistics.median(run[name] for run in rounds), 4) for name in rounds[0]}


def comparison(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each figure of the plain pipeline and of both our decoders, and whether ours is ahead."""
    table = {}
    for figure, (variant, more_is_better) in FIGURES.items():
        values = {"plain": results["plain"][figure]}
        values |= {name: results[name + variant][figure] for name in ("ours", "dali")}
        sign = 1 if more_is_better else -1
        ahead = {f"{name}_ahead": sign * values[name] > sign * values["plain"] for name in ("ours", "dali")}
        table[figure] = values | ahead
    return table


def run_once(name: str, work: Path, images: int) -> dict[str, float]:
    """One contender in a new process."""
    command = [sys.executable, __file__, str(work), "--one", name, "--images", str(images)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{name}: {run.stderr.strip()[-2000:]}")
    result: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def processor() -> str:
    """The name that the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Make the set, run every contender in its own process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, help="folder with JPEGs (or, with --one, the prepared work folder)")
    parser.add_argument("--images", type=int, default=400, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.photos, args.images)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_set(args.photos, work)
        rounds = [{name: run_once(name, work, args.images) for name in CONTENDERS} for _ in range(args.rounds)]
        results: dict[str, Any] = {name: median_of([r[name] for r in rounds]) for name in CONTENDERS}
        images = json.loads((work / "set" / "dataset.json").read_text())["images"]
    table = comparison(results)
    python_ms = 1000 / results["python"]["images_per_cpu_second"]
    print(f"{'':32s}{'plain':>10s}{'ours':>10s}{'dali':>10s}")
    for figure, row in table.items():
        marks = "".join(f"{row[name]:>9.3g}{'+' if row[f'{name}_ahead'] else '-'}" for name in ("ours", "dali"))
        print(f"{figure:32s}{row['plain']:>10.3g}{marks}")
    print(f"{'milliseconds without decode and resize, an image':52s}{python_ms:>10.3g}")
    from lcl_mcore.diagnostics.environment import source_commit

    results["comparison"] = table
    results["milliseconds_without_decode_and_resize"] = round(python_ms, 4)
    results["setting"] = {
        "command": " ".join(["python", *sys.argv]),
        **source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, one thread of a CPU shared with other work",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "rounds": args.rounds,
        "sequence_length": LENGTH,
        "image_size": SIDE,
        "images": images,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
