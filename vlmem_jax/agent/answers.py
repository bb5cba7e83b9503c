"""What comes of a question to a memory, and how it came to be believed."""

from typing import Any, Literal, NamedTuple

from vlmem_jax.agent.gates import Belief
from vlmem_jax.agent.segments import Span

Stage = Literal["initial", "L3", "L2", "L1"]
"""Without memory; what episodes are about; episodes; segments."""

TAKEN = {"L3": "retrieved_l2_indices", "L2": "selected_l2_indices", "L1": "selected_l1_indices"}
"""What a record calls the nodes that a stage has taken."""


class Visit(NamedTuple):
    """What a stage found."""

    stage: Stage
    belief: Belief
    text: str
    """The answer, where there are no options."""
    is_sure: bool
    taken: tuple[int, ...] = ()
    """Episodes, or segments of the last stage, in the order in which they were shown."""
    spans: tuple[Span, ...] = ()
    """When they are."""
    enough: float | None = None
    """Probability that what was found so far is enough, if that was asked."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        probabilities = self.belief.probabilities
        taken = {TAKEN[self.stage]: list(self.taken)} if self.stage in TAKEN else {}
        return {
            "stage": self.stage,
            "predicted_option": self.belief.label if probabilities else None,
            "entropy": self.belief.entropy,
            "confidence": max(probabilities.values(), default=None),
            "label_mass": self.belief.mass,
            "is_confident": self.is_sure,
            "enough": self.enough,
            "seconds": [list(span) for span in self.spans],
        } | taken


class Answer(NamedTuple):
    """What comes of a question."""

    label: str
    """The letter of an option; empty without options."""
    text: str
    stage: Stage
    """That is believed; it need not be the last."""
    belief: Belief
    in_memory: bool
    """Whether the memory holds enough to tell. If not, the answer is the likeliest all the same."""
    trace: tuple[Visit, ...]
    calls: int
    """Of the model."""
    images: int
    """That it was shown in them."""

    @property
    def evidence(self) -> tuple[Span, ...]:
        """When the video shows it; nothing where it does not."""
        spans = (visit.spans for visit in self.trace if visit.stage == self.stage)
        return next(spans, ()) if self.in_memory else ()

    def record(self) -> dict[str, Any]:
        """As JSON, with what MM-Mem's release writes under its names."""
        return {
            "final_answer": self.label or self.text,
            "text": self.text,
            "stage": self.stage,
            "entropy": self.belief.entropy,
            "option_probs": self.belief.probabilities,
            "in_memory": self.in_memory,
            "evidence": [list(span) for span in self.evidence],
            "calls": self.calls,
            "images": self.images,
            "retrieval_trace": [visit.record() for visit in self.trace],
        }
