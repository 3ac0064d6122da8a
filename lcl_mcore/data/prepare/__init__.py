"""Public data formats to the native one: every picture decoded once, every drop counted with its reason."""
