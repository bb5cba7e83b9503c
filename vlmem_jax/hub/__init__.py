"""Hugging Face checkpoints in and out: one name table a family, tensor by tensor."""
