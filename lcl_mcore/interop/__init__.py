"""Weights in the formats of other packages and of the released code, read and written."""
