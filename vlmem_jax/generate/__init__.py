"""From a checkpoint and a prompt to text: one engine for single prompts, batches, chats and rollouts."""

from vlmem_jax.generate.chat import Chat
from vlmem_jax.generate.engine import Engine
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import Invocation, InvocationConfig
from vlmem_jax.generate.load import LoadedModel, load_model, never_sampled
from vlmem_jax.generate.pools import Pool, answers
from vlmem_jax.generate.requests import Handle, Request
from vlmem_jax.generate.sampling import SamplingConfig
from vlmem_jax.generate.transcript import Transcript

__all__ = [
    "Chat",
    "Engine",
    "Generator",
    "Handle",
    "Invocation",
    "InvocationConfig",
    "LoadedModel",
    "Pool",
    "Request",
    "SamplingConfig",
    "Transcript",
    "answers",
    "load_model",
    "never_sampled",
]
