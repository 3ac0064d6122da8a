"""The commands of this package; `tools/*.py` call them."""
