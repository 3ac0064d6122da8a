"""One rank of a loader over gloo: `loader_worker.py OUT_FOLDER JSON`; killed and resumed by the tests.

Ranks are laid out as data-parallel x model-parallel (model-parallel fastest). Each rank appends one
line per step it "trained on": hash, counts, and a digest of all its tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from corpora import config, run_config, small_tokenizer
from lcl_mcore.batch import MicroBatch
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.loader import DataContext, build_loader
from lcl_mcore.errors import DataError


def sequence_digests(batch: MicroBatch, length: int) -> list[str]:
    """A digest per sequence of everything in it: ids, positions, targets, crops' pixels, keys, contexts."""
    result = []
    for b in range(len(batch.sequence_keys)):
        low, high = b * length, (b + 1) * length
        digest = hashlib.sha256(batch.tokens[low:high].numpy().tobytes())
        digest.update(batch.positions[low:high].numpy().tobytes())
        digest.update(batch.sequence_keys[b : b + 1].numpy().tobytes())
        mine = (batch.image_starts >= low) & (batch.image_starts < high)
        if len(batch.images):  # later pipeline stages get none
            digest.update(batch.images[mine].numpy().tobytes())
        digest.update(batch.image_keys[mine].numpy().tobytes())
        for places, values in (
            (batch.target_positions, batch.target_labels),
            (batch.context_positions, batch.group_ids),
        ):
            mine = (places >= low) & (places < high)
            digest.update((places[mine] - low).numpy().tobytes() + values[mine].numpy().tobytes())
        result.append(digest.hexdigest()[:16])
    return result


def break_reader() -> None:
    """From now on reading images fails on this rank in a way that nobody planned for."""

    def fail(*arguments: Any) -> None:
        raise TypeError("no such thing")

    ImageReader.begin = fail  # type: ignore[assignment,method-assign]


def main() -> None:
    """Join the groups, run the steps, write what was seen."""
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    place, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{os.environ['MEETING']}", rank=place, world_size=world)
    rank, model = dist.get_rank(), options["model"]
    dp_size, dp_rank, model_rank = dist.get_world_size() // model, rank // model, rank % model
    counts_group = model_group = None
    for m in range(model):
        group = dist.new_group([d * model + m for d in range(dp_size)], backend="gloo")
        counts_group = group if m == model_rank and dp_size > 1 else counts_group
    for d in range(dp_size):
        group = dist.new_group([d * model + m for m in range(model)], backend="gloo")
        model_group = group if d == dp_rank and model > 1 else model_group
    saved = out / "position.json"
    position: dict[str, Any] | None = json.loads(saved.read_text()) if saved.exists() else None
    data = config(*map(Path, options["folders"]), **options.get("config", {}))
    run = run_config(data, micro_batch_size=options.get("micro_batch_size", 2))
    pixel_ranks = tuple(options["pixel_ranks"]) if "pixel_ranks" in options else None
    context = DataContext(dp_rank, dp_size, counts_group, model_group, pixel_ranks)
    loader = build_loader(run, context, small_tokenizer(), position)
    if options.get("break_rank") == rank:
        break_reader()
    try:
        first = position["step"] if position else 0
        for step in range(first, options["steps"]):
            batch = next(loader)
            sequences = [d for b in batch.micro_batches for d in sequence_digests(b, data.sequence_length)]
            line = {
                "attempt": int(os.environ["ATTEMPT"]),
                "step": step,
                "dp": dp_rank,
                "model": model_rank,
                "sequences": sequences,
                "hash": batch.order_hash,
                "documents": [d for b in batch.micro_batches for d in b.documents],
                "images": [list(b.images.shape) for b in batch.micro_batches],
            }
            with (out / f"rank{rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if rank == 0:  # the "checkpoint" of the batch just trained on, written whole or not at all
                part = out / "position.part"
                part.write_text(json.dumps(batch.position))
                os.replace(part, saved)
            time.sleep(options.get("pause", 0.0))
    except DataError as error:
        (out / f"error{rank}.txt").write_text(str(error))
        os._exit(3)
    except TypeError as error:
        (out / f"error{rank}.txt").write_text(str(error))
        os._exit(4)
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
