"""What the policy is held to."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from vlmem_jax.nn.linear import held_dtype
from vlmem_jax.rl.objective import GRPOLoss
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.sharding import batch_sharding, param_shardings
from vlmem_jax.scoring.rewards import imported
from vlmem_jax.train.stages import Split, storage
from vlmem_jax.trees import Flat, flatten, unflatten
from vlmem_jax.types import Batch


class Reference:
    """The policy that KL is measured from, see `RLConfig.reference`: the trained parameters as they were at the start
    of the stage, a copy of these alone in the dtype that they are used in, or what a function makes of the current."""

    def __init__(self, objective: GRPOLoss, split: Split, mesh: Mesh, start: Callable[[], Callable[[dict], dict]]):
        """`start()` gives what gives the parameters of step 0, as `train.run.origin` does."""
        self._model, self._name = objective.model, objective.config.reference
        self._split, self._mesh, self._start = split, mesh, start
        self._copy: Flat | None = None
        self._program = jax.jit(
            objective.by_reference, out_shardings=batch_sharding(mesh), compiler_options=options(mesh)
        )

    def begin(self, params: dict, later: bool) -> None:
        """Copies what is kept of the start of the stage, once. `later`: `params` are of another step, so those of the
        start are read again."""
        if self._copy is not None or self._name != "start":
            return
        axes = flatten(self._model.axes())
        if later:
            abstract = flatten(self._model.abstract())
            places = flatten(param_shardings(self._mesh, self._model.abstract(), self._model.axes()))
            params = self._start()(unflatten(storage(self._split, abstract, axes, places, self._model.dtype)))
        trained, _ = self._split.part(flatten(params))

        def copied(trained: Flat) -> Flat:
            dtypes = {path: held_dtype(path, axes[path], self._model.dtype) for path in trained}
            return {path: jnp.array(x, dtypes[path], copy=True) for path, x in trained.items()}

        self._copy = jax.jit(copied, out_shardings={path: x.sharding for path, x in trained.items()})(trained)

    def known(self, params: dict, parts: Sequence[Batch]) -> list[dict[str, Array]]:
        """What it says of each part, see `GRPOLoss.by_reference`; `params` are the current ones."""
        if self._name == "start":
            reference = unflatten({**flatten(params), **self._copy})
        else:
            reference = imported(self._name, "reference")(params)
        return [self._program(reference, part) for part in parts]
