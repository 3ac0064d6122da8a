"""Saving and restoring a run, in any layout."""
