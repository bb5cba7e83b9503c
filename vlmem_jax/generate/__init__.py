"""From a checkpoint and a prompt to text: one loop for single prompts, batches, chats and rollouts."""

from vlmem_jax.generate.chat import Chat
from vlmem_jax.generate.invocation import Invocation, InvocationConfig
from vlmem_jax.generate.load import LoadedModel, load_model, never_sampled
from vlmem_jax.generate.loop import Generator, Session
from vlmem_jax.generate.sampling import SamplingConfig
from vlmem_jax.generate.transcript import Transcript

__all__ = [
    "Chat",
    "Generator",
    "Invocation",
    "InvocationConfig",
    "LoadedModel",
    "SamplingConfig",
    "Session",
    "Transcript",
    "load_model",
    "never_sampled",
]
