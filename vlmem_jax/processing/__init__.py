"""From files and text to model inputs: images, video, tokenizers, chat templates."""

from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.processor import Plan, Processor
from vlmem_jax.processing.tokenizer import Tokenizer

__all__ = ["ImageConfig", "Plan", "Processor", "Tokenizer"]
