"""The keys of the tasks that learn from prompts, `stages.N.task`."""

import dataclasses
from typing import Literal

from vlmem_jax.config import ConfigError, build
from vlmem_jax.generate import InvocationConfig, SamplingConfig
from vlmem_jax.memory import Speech
from vlmem_jax.runtime.sharding import MeshConfig
from vlmem_jax.scoring.rewards import RewardConfig
from vlmem_jax.train.config import Experiment, StageConfig

LossMean = Literal["sequence", "token"]
LOSS_WEIGHTS = {"sequence": "sample", "token": "token"}
"""The `data.loss_weight` that gives each mean."""


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """GRPO: phases of rollouts, and the steps that learn from each. The prompts are `data.train`, JSONL files.

    Of `data`, a step takes rows of pack_tokens and pack_tiles, rows / accumulation of them at a time, and as many as
    its trajectories fill: those of a prompt stand behind it in a row, as far as there is room.
    """

    play: str = ""
    """What is played with a prompt: MODULE:FUNCTION of your own, which makes an `rl.plays.Play` of experiment, stage
    and model. Empty: that of the memory, or single answers."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig("answer"),)
    """The score of an output is their weighted sum."""
    on_reward_error: Literal["raise", "zero"] = "raise"
    """What happens where a reward raises or gives no finite number; outputs that score 0 for it are counted."""
    reward_threads: int = 4
    """Outputs that are scored at the same time, beside the next rollout."""

    prompts: int = 8
    """Of a rollout phase."""
    group_size: int = 16
    """Trajectories of a prompt."""
    minibatches: int = 1
    """Parts that the trajectories of a phase are split into, a step each."""
    iterations: int = 1
    """How often a phase's trajectories are learned from before the next phase."""
    rollout_rows: int = 64
    """Trajectories that are sampled at the same time, but always whole groups, and one for each part of the mesh's
    rows."""
    rollout_mesh: MeshConfig | None = None
    """Mesh of the rollouts, where parameters are laid out anew once a phase. None: that of `vlmem generate`, or, where
    training splits rows and heads alone, its own. On training's own mesh parameters are used where they lie."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    """Of rollouts; ratios are of probabilities at temperature 1."""
    top_k: int = 0
    """As of `vlmem generate`; 0: all tokens."""
    top_p: float = 1.0

    invocation: InvocationConfig = InvocationConfig()
    """Who calls for a memory that speaks, in rollouts."""
    row_memories: int = 0
    """Memories that a row of an update has room for; 0: as many as an answer may have."""
    anywhere_from: float = 0.5
    """Part of the stage's steps after which invocation.anywhere counts."""
    base: bool = True
    """Whether one more answer to each prompt is drawn without memory, to say what the memory gains, where it speaks."""
    paired_base: bool = False
    """Whether that is done for each trajectory, with its random key: each is then measured against its own answer."""
    invocation_penalty: float | None = None
    """Weight alpha of the penalties of memories that do not help, or would have helped more as the other kind: for the
    latter, each trajectory with a memory is drawn again from its first one on, with kinds reversed. None: none."""
    rev_fraction: float = 1.0
    """Part of each group, rounded up, in which that is done; the others are not penalised for the kind."""

    advantage_std: bool = True
    """Whether advantages are divided by the standard deviation of their group."""
    advantage_eps: float = 1e-4
    """Added to that."""
    advantage_ddof: Literal[0, 1] = 0
    """Of that deviation: 0, of the population, or 1, of the sample."""
    advantage_min_std: float = 0.0
    """Advantages are divided by no less."""
    ties_by: str = ""
    """The part of the reward by which a group ties or does not, such as score; empty: the reward itself. A group that
    ties has no advantages, though other parts of its rewards differ."""
    drop_zero_variance: bool = True
    """Whether groups that tie are left out; if not, they still count in the means, and
    are held to the reference."""
    loss_mean: LossMean = "sequence"
    """Mean of the tokens of each trajectory and then of trajectories, or of all tokens alike."""
    clip: float = 0.2
    """Ratios below 1 - clip teach nothing more."""
    clip_high: float | None = None
    """The same above 1 + clip_high; None: as clip."""

    kl: float = 0.0
    """Weight beta of the KL penalty; 0: there is no reference."""
    kl_of: Literal["drawn", "labels"] = "drawn"
    """What it is computed of: an estimate by the tokens that were drawn (k3), or, in plays whose steps are drawn among
    labels, exactly, of all of these."""
    reference: str = "start"
    """What KL is measured from: `start`, the trained parameters as they were at the start of the stage (a copy of these
    alone), or MODULE:FUNCTION of your own, which makes its parameters of the current ones."""
    kl_target: float = 0.03
    """KL a token that adaptive_kl aims at."""
    adaptive_kl: bool = False
    """Whether beta grows by half where a phase's KL is above 1.5 x kl_target, and shrinks alike below it / 1.5."""

    def __post_init__(self):
        for key in ("reward_threads", "prompts", "minibatches", "iterations", "rollout_rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.row_memories < 0:
            raise ValueError(f"row_memories must be at least 0, got {self.row_memories}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, since trajectories are compared; got {self.group_size}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, so that trajectories differ; got {self.temperature}")
        if self.minibatches > self.prompts * self.group_size:
            raise ValueError(
                f"minibatches must be at most prompts x group_size = {self.prompts * self.group_size}, "
                f"got {self.minibatches}"
            )
        if not 0 < self.clip < 1 or (self.clip_high is not None and self.clip_high <= 0):
            raise ValueError(
                f"clip must be between 0 and 1 and clip_high positive, got {self.clip} and {self.clip_high}"
            )
        if self.kl < 0 or self.kl_target <= 0 or self.advantage_eps < 0:
            raise ValueError(
                "kl and advantage_eps must be at least 0 and kl_target positive, got "
                f"{self.kl}, {self.advantage_eps} and {self.kl_target}"
            )
        if self.advantage_min_std < 0:
            raise ValueError(f"advantage_min_std must be at least 0, got {self.advantage_min_std}")
        if not 0 <= self.anywhere_from <= 1:
            raise ValueError(f"anywhere_from must be from 0 to 1, got {self.anywhere_from}")
        if self.invocation_penalty is not None and (self.invocation_penalty < 0 or not self.base):
            raise ValueError(
                "invocation_penalty must be at least 0, and needs base=True; got "
                f"{self.invocation_penalty} and base={self.base}"
            )
        if self.paired_base and not self.base:
            raise ValueError("paired_base is of answers without memory, and needs base=True; got base=False")
        if not 0 <= self.rev_fraction <= 1 or (self.rev_fraction < 1 and self.invocation_penalty is None):
            raise ValueError(
                "rev_fraction must be from 0 to 1, and is of the rollouts that invocation_penalty takes; got "
                f"{self.rev_fraction} and invocation_penalty={self.invocation_penalty}"
            )
        if self.adaptive_kl and not self.kl:
            raise ValueError("adaptive_kl changes kl, which must be positive to begin with; got 0")
        if self.reference != "start" and ":" not in self.reference:
            raise ValueError(f"reference must be start or MODULE:FUNCTION, got {self.reference!r}")
        if self.play and ":" not in self.play:
            raise ValueError(f"play must be MODULE:FUNCTION, got {self.play!r}")
        self.sampling()

    @property
    def steps(self) -> int:
        """Optimizer steps of a phase."""
        return self.minibatches * self.iterations

    def sampling(self, greedy: bool = False) -> SamplingConfig:
        """How tokens of rollouts are drawn; `greedy`: how those of evaluation are chosen."""
        if greedy:
            return SamplingConfig(self.max_new_tokens)
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class MemorySFTConfig:
    """Supervised warm-up of what forms memories. The answers of prompts are its targets."""

    prompts: int = 8
    """Of a step."""
    rollout_rows: int = 64
    """Prompts that are read at the same time, to hear what a memory is formed from."""
    loss_mean: LossMean = "sequence"
    """Mean of the tokens of each answer and then of answers, or of all tokens alike."""
    disabled: tuple[str, ...] = ()
    """Kinds of memory that are not formed, such as long."""
    row_memories: int = 1
    """Memories that a row has room for, each with an answer."""

    def __post_init__(self):
        for key in ("prompts", "rollout_rows", "row_memories"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")


def rl_config(stage: StageConfig) -> RLConfig:
    """The keys of a stage whose task is grpo. Raises ConfigError, naming the key."""
    return build(RLConfig, stage.task_keys, f"config.stages.{stage.name}.task")


def sft_config(stage: StageConfig) -> MemorySFTConfig:
    """The keys of a stage whose task is memory_sft. Raises ConfigError, naming the key."""
    return build(MemorySFTConfig, stage.task_keys, f"config.stages.{stage.name}.task")


def longest_answer(config: RLConfig, speech: Speech | None) -> int:
    """Most tokens that may follow a prompt, latent ones included. Raises ValueError for more memories than may be."""
    return config.max_new_tokens + (config.invocation.budget(speech) * (speech.latents + 1) if speech else 0)


def check_prompted(experiment: Experiment, stage: StageConfig) -> None:
    """Raises ConfigError, naming the key, where a stage cannot learn from prompts that it reads one by one."""
    data, decoder, where = experiment.data_of(stage), experiment.model.decoder, f"config.stages.{stage.name}"
    if not data.train:
        raise ConfigError(f"{where}: data.train must name at least one JSONL file of prompts")
    if decoder.ntk_factor and data.pack_tokens > decoder.max_positions:
        raise ConfigError(
            f"{where}: data.pack_tokens {data.pack_tokens} must be at most model.decoder.max_positions "
            f"{decoder.max_positions}: beyond it, dynamic NTK turns the tokens of a whole sample otherwise than "
            "when its answer was drawn, by the length of the prompt"
        )
