"""Process groups and the wrappers that spread the model over them."""
