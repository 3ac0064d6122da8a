"""Look at a prepared data set: its statistics, or one document as HTML (`tools/inspect_data.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.config.schema import DataConfig, Packing, SourceConfig, TokenizerConfig
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import require_writable


@config_dataclass
class InspectOptions:
    """Look at a prepared data set: its statistics, or one document as HTML."""

    data: tyro.conf.Positional[str]
    """Folder or URL of the prepared data set."""
    tokenizer: str
    """tokenizer.json, or a folder that holds it."""
    tokenizer_kind: Literal["file", "opt", "clip"] = "file"
    """Whose special ids."""
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens per packed sequence."""
    packing: Literal[Packing, "by_kind"] = "best_fit"
    """How documents share sequences, as data.packing; by_kind is that of the paper's recipes."""
    tokens_per_image: PositiveInt = 196
    """Tokens that an image takes."""
    sample: PositiveInt = 1000
    """Documents measured for the statistics."""
    document: NonNegativeInt | None = None
    """Number of the document to show."""
    epoch: NonNegativeInt = 0
    """Random choices differ between epochs."""
    html: Path | None = None
    """Where the page goes; by default the standard output."""


def main() -> int:
    """Parse the command line and show."""
    options = arguments.parse(InspectOptions)
    if options.html is not None:
        require_writable(options.html, "--html", file=True)

    from lcl_mcore.data.inspection import Inspector
    from lcl_mcore.data.tokenizer import build_tokenizer
    from lcl_mcore.storage import atomic_write

    tokenizer = build_tokenizer(TokenizerConfig(kind=options.tokenizer_kind, path=options.tokenizer))
    config = DataConfig(sequence_length=options.sequence_length, packing=options.packing)
    inspector = Inspector(config, SourceConfig(path=options.data), tokenizer, options.tokens_per_image)
    try:
        if options.document is None:
            print(json.dumps(inspector.statistics(options.sample), indent=1))
        elif options.html:
            atomic_write(options.html, inspector.page(options.document, options.epoch))
        else:
            print(inspector.page(options.document, options.epoch))
    except IndexError as error:
        raise DataError(explain(f"--document {options.document}", str(error), "Choose a lower one.")) from None
    except OSError as error:
        raise DataError(explain(options.html, f"cannot be written ({error.strerror})", "Choose another.")) from None
    finally:
        inspector.close()
    return 0


if __name__ == "__main__":
    run_main(main)
