"""Look at a prepared data set: its statistics, or one document as HTML.

python tools/inspect_data.py DATA --tokenizer tokenizer.json
python tools/inspect_data.py DATA --tokenizer tokenizer.json --document 7 --html page.html
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lcl_mcore.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lcl_mcore.data.inspection import Inspector
from lcl_mcore.data.tokenizer import build_tokenizer
from lcl_mcore.errors import LclError


def main() -> int:
    """Parse the command line and show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder or URL of the prepared data set")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--tokenizer-kind", choices=["file", "opt", "clip"], default="file")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--tokens-per-image", type=int, default=196)
    parser.add_argument("--sample", type=int, default=1000, help="documents measured for the statistics")
    parser.add_argument("--document", type=int, help="number of the document to show")
    parser.add_argument("--epoch", type=int, default=0, help="random choices differ between epochs")
    parser.add_argument("--html", type=Path, help="where the page goes (default: standard output)")
    args = parser.parse_args()
    try:
        tokenizer = build_tokenizer(TokenizerConfig(kind=args.tokenizer_kind, path=args.tokenizer))
        config = DataConfig(sequence_length=args.sequence_length)
        inspector = Inspector(config, SourceConfig(path=args.data), tokenizer, args.tokens_per_image)
        if args.document is None:
            print(json.dumps(inspector.statistics(args.sample), indent=1))
        elif args.html:
            args.html.write_text(inspector.page(args.document, args.epoch))
        else:
            print(inspector.page(args.document, args.epoch))
        inspector.close()
    except (LclError, IndexError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
