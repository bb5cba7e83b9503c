"""What VisMem is made of."""

import dataclasses
from typing import Literal

from vlmem_jax.memory.base import MemoryConfig
from vlmem_jax.nn.encoder import EncoderConfig
from vlmem_jax.nn.lora import LoRAConfig


@dataclasses.dataclass(frozen=True)
class VisMemConfig(MemoryConfig):
    """Defaults: those of the paper's main text (tables 10 and 11) for Qwen2.5-VL."""

    query_len: int = 8
    short_len: int = 8
    long_len: int = 16
    """Latent tokens of a memory."""
    former: Literal["lora_llm", "tiny_transformer", "lora_vision"] = "lora_llm"
    """The model's own decoder with an adapter a kind; a small encoder a kind; or, for short memories, the last layers
    of the model's own vision tower with an adapter of q and v, and lora_llm for long ones."""
    vision_layer: int = 24
    """The first of those layers of the tower."""
    query_builder: EncoderConfig = EncoderConfig()
    tiny: EncoderConfig = EncoderConfig()
    """Of each kind's encoder under tiny_transformer."""
    lora: LoRAConfig = LoRAConfig()
    visual_states: Literal["vision_encoder", "all", "llm_hidden_first_span"] = "vision_encoder"
    """What is kept of images: their tokens as the decoder sees them; all of them in the order of the tower, also where
    `image.context` keeps some out of the sequence; or the decoder's last states of the first image, from its start
    token to its end token."""
    max_visual_hidden: int = 2048
    """Most states kept of a row's images; of more, neighbours are averaged."""
    max_prompt_hidden: int = 1024
    """Most states of the text; the newest are kept."""
    max_positions: int = 4096
    """Learned positions of the query builder."""
    position_std: float = 0.02
    """What they, and its learned queries, start from: normal numbers of this size."""
    normed_states: bool = False
    """Whether the query builder scales each state to a root mean square of 1; beside visual tokens that are much
    larger than 1, small positions are lost, and with them which token is which."""
    memory_output: Literal["raw", "rescaled"] = "raw"
    """Whether latent tokens are scaled to the size of embeddings, by a gain that is trained."""
    max_invocations: int = 8
    """In one answer."""
    token_ids: tuple[int, int, int, int] = (151665, 151666, 151667, 151668)
    """Of TOKENS."""
    span_ids: tuple[int, int] = (151652, 151653)
    """Tokens before and after an image, for llm_hidden_first_span."""
    end_rate: float = 0.1
    """The learning rate of the rows of end tokens, which are never chosen, as a part of the others'."""
    invoke_bias: float = -4.0
    """Start of the bias on calls: an untrained model that ends a sentence should not call instead."""
    start_id: int = 13
    """The token from whose rows those of the four start: a full stop."""

    kind: Literal["vismem"] = "vismem"

    def __post_init__(self):
        if min(self.query_len, self.short_len, self.long_len, self.max_prompt_hidden, self.max_invocations) < 1:
            raise ValueError(f"lengths and limits must be at least 1, got {self}")
        if self.max_visual_hidden < 0:
            raise ValueError(f"max_visual_hidden must be at least 0, got {self.max_visual_hidden}")
        longest = self.max_visual_hidden + self.max_prompt_hidden + self.query_len
        if longest > self.max_positions:
            raise ValueError(
                f"max_positions must be at least max_visual_hidden + max_prompt_hidden + query_len = {longest}, got "
                f"{self.max_positions}"
            )
        if len(set(self.token_ids)) < 4:
            raise ValueError(f"token_ids must be four different ids, got {self.token_ids}")

    @property
    def lengths(self) -> tuple[int, int]:
        """Latent tokens of each kind."""
        return self.short_len, self.long_len

    @property
    def kinds(self) -> tuple[Literal["short", "long"], ...]:
        """Names of the kinds of memory by their number."""
        return "short", "long"
