"""The two losses of LCL: contrastive at `<BoI>`, next-token cross-entropy on text."""
