"""The vision encoder for timm, open_clip and transformers, checked against the model it came from."""
