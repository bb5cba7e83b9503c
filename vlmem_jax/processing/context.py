"""The context budget: which visual tokens stand in the sequence, apart from those that a memory reads."""

import re
from typing import NamedTuple


class Context(NamedTuple):
    """What of a picture or video stands in the sequence."""

    kind: str = "all"
    """`all`; `thumbnail`: of a tiled image, the thumbnail alone; `pooled`: means of k x k neighbours; `stride`: of a
    video, every n-th frame, or step of time; `kept`: the frames that a memory keeps of it, n at most."""
    by: int = 1
    """k or n."""

    @property
    def pooled(self) -> int:
        """k, and 1 where nothing is pooled."""
        return self.by if self.kind == "pooled" else 1

    @property
    def stride(self) -> int:
        """n, and 1 where all frames stand in the sequence."""
        return self.by if self.kind == "stride" else 1

    @property
    def kept(self) -> int:
        """n, and 0 where a memory chooses no frames."""
        return self.by if self.kind == "kept" else 0


def read_context(text: str) -> Context:
    """The context that `text` names, such as `pooled:2`. Raises ValueError where it names none."""
    match = re.fullmatch(r"(all|thumbnail)|(pooled|stride|kept):0*([1-9]\d*)", text)
    if not match or (match[3] == "1" and match[2] != "kept"):
        raise ValueError(
            f"context must be all, thumbnail, pooled:k, stride:n or kept:n, k and n at least 2; got {text!r}"
        )
    return Context(match[1] or match[2], int(match[3] or 1))
