"""The language model: one decoder for every family, told apart by its config."""

from vlmem_jax.decoder.decoder import Decoder, DecoderConfig, Interleaved

__all__ = ["Decoder", "DecoderConfig", "Interleaved"]
