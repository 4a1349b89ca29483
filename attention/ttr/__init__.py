"""Flux2TTR: attention students that learn from the model's own attention while it samples."""
