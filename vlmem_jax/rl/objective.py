"""What an update of GRPO computes on packed rows."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmem_jax.generate.score import label_logp
from vlmem_jax.models import VLM
from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.loss import exact_kl, grpo_loss, has_collapsed
from vlmem_jax.rl.rows import Rows
from vlmem_jax.train.loss import log_probs_where
from vlmem_jax.types import Batch


@dataclasses.dataclass
class GRPOLoss:
    """The `grpo` task without its data."""

    model: VLM
    config: RLConfig
    chunk: int
    """Tokens of a row whose logits exist at the same time."""
    banned_ids: tuple[int, ...]
    """Never drawn, so no part of the softmax."""
    labels: tuple[int, ...] = ()
    """The tokens that alone are part of it, where steps are drawn among labels."""

    def log_probs(self, params: dict, batch: Batch) -> Float[Array, "B T"]:
        """Log-probability of each target that has a weight, as the sampler computes it; 0 of others."""
        text = batch.text
        if self.labels:
            return self._of_drawn(self._of_labels(params, batch), batch)
        hidden_BTD = self.model.hidden(params, batch)
        kernel_DV = self.model.head_kernel(params)
        rescore = functools.partial(self.model.rescore, params) if self.model.speech else None
        wanted_BT = text.weights_BT > 0
        return log_probs_where(hidden_BTD, kernel_DV, text.targets_BT, wanted_BT, self.chunk, self.banned_ids, rescore)

    def by_reference(self, params: dict, batch: Batch) -> dict[str, Array]:
        """What the reference, which has these parameters, says of a batch: fields of `Rows`."""
        if self.config.kl_of == "drawn":
            return {"ref_logp_BT": self.log_probs(params, batch)}
        logp_BTK = self._of_labels(params, batch)
        return {"ref_logp_BT": self._of_drawn(logp_BTK, batch), "ref_labels_BTK": logp_BTK}

    def _of_labels(self, params: dict, batch: Batch) -> Float[Array, "B T K"]:
        labels_K = jnp.array(self.labels, jnp.int32)
        return label_logp(self.model, params, batch, labels_K, jnp.ones(len(self.labels), bool))

    def _of_drawn(self, logp_BTK: Float[Array, "B T K"], batch: Batch) -> Float[Array, "B T"]:
        """Those of the labels that were drawn, 0 where none was."""
        is_drawn_BTK = batch.text.targets_BT[..., None] == jnp.array(self.labels, jnp.int32)
        is_drawn_BTK &= batch.text.weights_BT[..., None] > 0
        return jnp.where(is_drawn_BTK, logp_BTK, 0.0).sum(-1)

    def loss(self, params: dict, rows: Rows, key: Array | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `grpo_loss`. Nothing is dropped at random, since nothing was when the tokens were drawn.

        Steps whose log-probabilities have collapsed, see `has_collapsed`, are skipped; `collapsed` sums their weight.
        """
        c, text, kl_BT = self.config, rows.batch.text, None
        if rows.ref_labels_BTK is None:
            logp_BT = self.log_probs(params, rows.batch)
        else:
            logp_BTK = self._of_labels(params, rows.batch)
            logp_BT, kl_BT = self._of_drawn(logp_BTK, rows.batch), exact_kl(logp_BTK, rows.ref_labels_BTK)
        known = (rows.old_logp_BT, rows.ref_logp_BT) if c.kl else (rows.old_logp_BT,)
        counted = text.segments_BT, text.weights_BT
        skipped_BT = functools.reduce(jnp.logical_or, (has_collapsed(logp_BT, x_BT, *counted) for x_BT in known))
        loss, sums = grpo_loss(
            logp_BT,
            rows.old_logp_BT,
            rows.ref_logp_BT,
            rows.advantage_BT,
            jnp.where(skipped_BT, 0.0, text.weights_BT),
            jnp.broadcast_to(rows.beta_B[:, None], rows.advantage_BT.shape),
            c.clip,
            c.clip_high,
            kl_BT,
        )
        sums["collapsed"] = jnp.sum(text.weights_BT, where=skipped_BT)
        if not c.kl:
            del sums["kl"]
        return loss, sums
