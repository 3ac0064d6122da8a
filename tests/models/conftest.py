"""The helpers beside the tests (`batches`, `reference_model`) are plain modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
