"""Public data formats to the native one: every image decoded once, every drop counted with its reason."""
