"""The benchmarks are scripts; what the tests import from them is found beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
