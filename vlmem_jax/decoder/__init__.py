"""The language model: one decoder for every family, told apart by its config."""

from vlmem_jax.decoder.decoder import Decoder, DecoderConfig, Tap

__all__ = ["Decoder", "DecoderConfig", "Tap"]
