"""The rows of an engine on the device, and the programs that read prompts into them and draw their tokens.

A row reads its prompt by itself, chunk by chunk, and is then put among the others. Each step gives every row that runs
a token; one that calls for a memory waits, on the device, until the memory is put behind it.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.generate.invocation import Calls, InvocationConfig, Rule
from vlmem_jax.generate.sampling import Choice, SamplingConfig, choose
from vlmem_jax.models import VLM
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import constrain, lay_out, replicate
from vlmem_jax.trees import State, axes, fitted, get_row, map_axes, put_row
from vlmem_jax.types import Batch, DecodeState, Text, TileShape, VisualTokens

NOTHING, WAITING, BROKEN = -1, -2, -3
"""In place of the token of a row that has ended, that waits for its memory, or whose scores are not finite."""

STOPS = 16
"""Ids that can end an answer, at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row(State):
    """A row, or B of them, whose prompts are read: all that makes their next tokens."""

    decode: DecodeState
    logits_BV: Float[Array, "B V"] = axes("batch", "vocab")
    """Scores of the next token."""
    choice: Choice
    rule: Rule
    calls: Calls
    running_B: Bool[Array, "B"] = axes("batch")
    """Whether it draws tokens, or waits to do so."""


class Plan(NamedTuple):
    """What the host knows of the next step."""

    needed: Int32[Any, ""]
    """The most that a row needs, see `sampling.need`."""
    used: Int32[Any, ""]
    """Slots of the cache that the longest row fills, its next token included."""


class Programs(NamedTuple):
    """The programs of one model, one mesh and one shape, each compiled at its first call for each size."""

    empty: Callable
    """`empty()`: rows of which none runs."""
    see: Callable
    """`see(params, views)`: what prompts show."""
    first: Callable
    """`first(params, text, visual, length_B)`: the first chunk of prompts of so many tokens, each in a lane."""
    more: Callable
    """`more(params, decode, logits_BV, text, visual, used)`: what follows on what was read."""
    put: Callable
    """`put(rows, decode, logits_BV, own, lane, n)`: row n goes on from what a lane has read, by settings of its own;
    `rows` are donated here and below."""
    back: Callable
    """`back(rows, row, n)`: row n is one that was got."""
    get: Callable
    """`get(rows, n)`: row n by itself."""
    step: Callable
    """`step(params, rows, delimiter_V, plan)`: the rows, and the token of each with its log-probability."""
    form: Callable
    """`form(params, decode, latents_BND, rows_R, kinds_R, size)`: latent tokens of some rows, in their places."""
    insert: Callable
    """`insert(params, rows, latents_BND, kinds_B, used)`: these behind their rows, with the tokens that end them."""
    score: Callable
    """`score(params, row, tokens_KT, used)`: log-probabilities of K continuations of a row."""


@functools.lru_cache(maxsize=8)
def compiled(vlm: VLM, mesh: Mesh | None, shape: PoolShape, tile: TileShape) -> Programs:
    """The programs of a model on a mesh."""
    speech, vocab = vlm.speech, vlm.config.decoder.vocab
    abstract, read = vlm.abstract(), None
    known = tile._replace(geometry=vlm.tile.geometry)  # what was seen elsewhere may have had geometry that prompts lack

    def widest(lanes):
        return Batch.empty((lanes,), shape.text_sizes[-1], shape.tiles, known)

    @functools.cache  # of rows of any number of tiles, each of which is a program of its own
    def seen(lanes):
        return jax.eval_shape(vlm.see, abstract, widest(lanes).views)

    def see(params, views):
        return _split(fitted(vlm.see(params, views), seen(len(views.segments_BM))))

    def first(params, text, visual, length_B):
        hidden_BD, decode = vlm.extend(params, vlm.begin(length_B, shape.capacity, shape.int8), text, visual)
        if read:
            decode = fitted(decode, map_axes(functools.partial(_rows, len(length_B)), read))
        return vlm.score(params, hidden_BD), lay_out(decode)

    def more(params, decode, logits_BV, text, visual, used):
        hidden_BD, decode = vlm.extend(params, decode, text, visual, used=used)
        some_B1 = (text.segments_BT > 0).any(-1)[:, None]
        return jnp.where(some_B1, vlm.score(params, hidden_BD), logits_BV), lay_out(decode)

    def put(rows, decode, logits_BV, own, lane, n):
        logits_1V = jax.lax.dynamic_slice_in_dim(logits_BV, lane, 1)
        return lay_out(put_row(rows, Row(get_row(decode, lane), logits_1V, *own, jnp.ones(1, bool)), n))

    def step(params, rows, delimiter_V, plan):
        choice, rule, calls, decode = rows.choice, rows.rule, rows.calls, rows.decode
        running_B = rows.running_B & ((calls.count_B < rule.limit_B) | calls.waiting_B)
        finite_B = jnp.isfinite(rows.logits_BV).all(-1)
        withheld_BV = calls.withheld(speech, vocab) if speech else None
        tokens_B, logp_B = choose(rows.logits_BV, choice, decode.length_B, plan.needed, withheld_BV)
        given_B = calls.force(rule, delimiter_V, speech, choice.keys_B, decode.length_B)
        tokens_B = jnp.where(given_B >= 0, given_B, tokens_B)
        logp_B = jnp.where(given_B >= 0, jnp.nan, logp_B)
        tokens_B = jnp.where(finite_B, tokens_B, BROKEN)
        tokens_B = jnp.where(calls.waiting_B, WAITING, tokens_B)
        tokens_B = jnp.where(running_B, tokens_B, NOTHING)
        running_B &= (finite_B | calls.waiting_B) & ~choice.stops(tokens_B)
        counts_B = (running_B & (tokens_B >= 0)).astype(jnp.int32)
        hidden_BD, decode = vlm.extend(params, decode, Text.first(tokens_B[:, None], counts_B), used=plan.used)
        calls = calls.take(rule, speech, tokens_B, counts_B)
        logits_BV = jnp.where(counts_B[:, None] > 0, vlm.score(params, hidden_BD), rows.logits_BV)
        rows = lay_out(Row(decode, logits_BV, choice, rule, calls, running_B))
        tokens_B, logp_B = (constrain(x, "batch") for x in (tokens_B, logp_B))
        return rows, *replicate((tokens_B, logp_B))  # every host reads them

    def form(params, decode, latents_BND, rows_R, kinds_R, size):
        latents_RND, inputs = vlm.form(params, decode, rows_R, kinds_R, size)
        latents_BND = latents_BND.at[rows_R].set(latents_RND.astype(latents_BND.dtype), mode="drop")
        return replicate((latents_BND, inputs))

    def insert(params, rows, latents_BND, kinds_B, used):
        called_B, kinds_B = kinds_B >= 0, jnp.maximum(kinds_B, 0)
        lengths_B, ends_B = (jnp.array(of, jnp.int32)[kinds_B] for of in (speech.lengths, speech.end_ids))
        index_T = jnp.arange(speech.latents + 1, dtype=jnp.int32)
        tokens_BT = jnp.where(index_T == lengths_B[:, None], ends_B[:, None], 0)
        text = Text.first(tokens_BT, jnp.where(called_B, lengths_B + 1, 0))
        text = dataclasses.replace(text, visual_index_BT=jnp.where(index_T < lengths_B[:, None], index_T, -1))
        after_BD, decode = vlm.extend(params, rows.decode, text, latents_BND=latents_BND, used=used)
        logits_BV = jnp.where(called_B[:, None], vlm.score(params, after_BD), rows.logits_BV)
        return lay_out(
            dataclasses.replace(rows, decode=decode, logits_BV=logits_BV, calls=rows.calls.answered(ends_B, called_B))
        )

    def score(params, row, tokens_KT, used):
        banned_V = row.choice.banned_BV[0]

        def one(tokens_T):
            """Reads all but the last token behind the row, of which nothing is kept."""
            text = Text.first(tokens_T[None], (tokens_T >= 0).sum(dtype=jnp.int32)[None])
            hidden_BTD, _ = vlm.extend(params, row.decode, text, used=used + len(tokens_T), every=True)
            logits_TV = jnp.concatenate([row.logits_BV, vlm.score(params, hidden_BTD)[0, :-1]])
            logp_TV = jax.nn.log_softmax(jnp.where(banned_V, -jnp.inf, logits_TV).astype(jnp.float32))
            return jnp.take_along_axis(logp_TV, jnp.maximum(tokens_T, 0)[:, None], axis=1)[:, 0]

        return replicate(jax.lax.map(one, tokens_KT))

    def empty():
        return lay_out(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows))

    def jit(function, **how):
        return jax.jit(function, compiler_options=options(mesh), **how)

    batch, length_B = widest(1), np.ones(1, np.int32)
    read = jax.eval_shape(first, abstract, prompt_text(batch.text), seen(1), length_B)[1]
    logits_BV = jax.ShapeDtypeStruct((1, vocab), jnp.float32)
    rows = map_axes(functools.partial(_rows, shape.slots), Row(read, logits_BV, *settings(vlm, shape), length_B > 0))
    return Programs(
        jit(empty),
        jit(see),
        jit(first),
        jit(more, donate_argnums=(1, 2)),
        jit(put, donate_argnums=0),
        jit(lambda rows, row, n: lay_out(put_row(rows, row, n)), donate_argnums=0),
        jit(lambda rows, n: lay_out(get_row(rows, n))),
        jit(step, donate_argnums=1),
        jit(form, donate_argnums=2, static_argnums=5),
        jit(insert, donate_argnums=1),
        jit(score),
    )


def _split(visual: VisualTokens) -> VisualTokens:
    """Rows on the devices that split them."""
    deep_NBMD, rest = visual.deep_NBMD, dataclasses.replace(visual, deep_NBMD=None)
    rest = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), rest)
    if deep_NBMD is None:
        return rest
    return dataclasses.replace(rest, deep_NBMD=constrain(deep_NBMD, None, "batch", None, None))


def _rows(count: int, x: Any, *names: str | None) -> jax.ShapeDtypeStruct:
    """The shape of an array of one row, of so many."""
    axis = names.index("batch")
    return jax.ShapeDtypeStruct((*x.shape[:axis], count, *x.shape[axis + 1 :]), x.dtype)


def settings(
    vlm: VLM,
    shape: PoolShape,
    sampling: SamplingConfig = SamplingConfig(),
    invocation: InvocationConfig = InvocationConfig(),
    forced: Sequence[int] = (),
    banned_ids: Collection[int] = (),
    stop_ids: Collection[int] = (),
    key_2: np.ndarray | None = None,
) -> tuple[Choice, Rule, Calls]:
    """The settings of a row, on the host. Raises ValueError for more stop ids, or forced tokens, than there is room
    for."""
    if len(stop_ids) > STOPS:
        raise ValueError(f"an answer can be ended by {STOPS} ids, got {len(stop_ids)}")
    speech, vocab = vlm.speech, vlm.config.decoder.vocab
    key_B2 = None if key_2 is None else np.asarray(key_2)[None]
    return (
        Choice.make(sampling, 1, vocab, banned_ids, stop_ids, key_B2, STOPS),
        Rule.make(invocation, speech, sampling.max_new_tokens, [forced], 1, shape.forced),
        Calls.none(1, invocation.budget(speech) if speech else 0),
    )


def prompt_text(text: Text) -> Text:
    """The arrays of a padded prompt that are read."""
    return dataclasses.replace(text, targets_BT=None, weights_BT=None)
