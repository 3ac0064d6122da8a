"""What a trained encoder is worth: retrieval, generation loss with and without images, reports."""
