"""VLM^2's demo: a small LLaVA-Video learns where the posters of a room are, and keeps few frames of a long video.

The base stands for the public model that VLM^2 starts from, and is handed over as such: in the Hugging Face layout,
without memory. It goes on in two ways, in as many steps: as it is, and with the 3D-aware representation. That one's
banks are then trained on videos of which they keep a part (arXiv 2511.20644).
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmem_jax.config import to_dict
from vlmem_jax.demo import room_evaluate, vlm2_report
from vlmem_jax.demo.config import TRIAL, common, conversations, stage
from vlmem_jax.demo.job import Say, Workdir
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.page import percent
from vlmem_jax.demo.pictures import Curve, curves
from vlmem_jax.demo.room_dataset import LONG, SHOWN, RoomsConfig, asked_name, write_rooms
from vlmem_jax.demo.room_evaluate import Videos
from vlmem_jax.demo.room_questions import CHANCE, TYPES
from vlmem_jax.demo.vlm2_report import Strip, accuracy, title
from vlmem_jax.families import resolve
from vlmem_jax.generate import LoadedModel, load_model
from vlmem_jax.models import VLM

PRESET = "rooms_llava_video"
STEPS = {"read": 300, "glimpse": 300, "tell": 300, "ask": 600, "memory": 80}
"""Reading single frames, then several; telling what a short video shows, and answering about it; and the banks, on
longer videos."""
RATE = 2e-3
"""The learning rate: at 5e-3 digits are not learned."""
PLACED = {"kind": "vlm2", "working": 1, "episodic": 0}
"""The representation alone: banks that are not trained leave frames as they are."""
BOTH = {"kind": "vlm2", "working": 4, "episodic": SHOWN}
BANKS = ("memory/banks",)
ROWS = 8
"""Of a step on videos; steps on few frames have twice as many."""


class Row(NamedTuple):
    """A row of the table."""

    what: str
    where: str
    """The folder of the model."""
    frames: str
    """Which frames are shown: a name of `room_evaluate.CHOICES`, or `kept`: those that the memory keeps of all."""
    memory: dict[str, Any] | None = None
    """Keys of the memory that are other than in training."""


DEFAULT_ROWS = {
    "base": Row("base, 8 frames spread evenly", "flat", "uniform"),
    "space": Row("+3D, 8 frames spread evenly", "space", "uniform"),
    "both": Row("+3D, working and episodic memory, the paper's rule", "vlm2", "kept"),
    "pair": Row("the same, our rule: the older of the two most alike goes", "vlm2", "kept", {"write": "pair"}),
    "oracle": Row("+3D, 8 frames that show every poster", "space", "oracle"),
    "base_oracle": Row("base, 8 frames that show every poster", "flat", "oracle"),
}
COMPARED_ROWS = {
    "last": Row("+3D, the last 8 frames", "space", "last"),
    "random": Row("+3D, 8 frames at random", "space", "random"),
    "working": Row("+3D, working memory, 8 frames spread evenly", "working", "stride"),
    "episodic": Row("+3D, episodic memory, the paper's rule", "episodic", "kept"),
    "untrained": Row("+3D, banks that were not trained, the paper's rule", "space", "kept", {"episodic": SHOWN}),
}
"""What `--compare` adds."""
SWEPT = (2, 4, 8), (4, 8, 16)
"""Working and episodic entries that `--compare` asks the memory with; it was trained with those of BOTH."""


@dataclasses.dataclass(frozen=True)
class VLM2Recipe:
    """How long to train, and on how much data."""

    steps: dict[str, int]
    dataset: RoomsConfig
    rows: int
    """See ROWS."""
    seed: int = 0
    """The seed of parameters and of the order of the data."""

    @classmethod
    def scaled(cls, scale: float = 1.0, seed: int = 0) -> "VLM2Recipe":
        """All steps and videos times `scale`, to try things out; below TRIAL, videos are short, too.

        Raises ValueError if it is not positive.
        """
        if not scale > 0:
            raise ValueError(f"--steps-scale must be positive, got {scale}")

        def times(count: int, least: int = 1) -> int:
            return max(least, round(count * scale))

        sizes = RoomsConfig()
        dataset = dataclasses.replace(
            sizes,
            read=times(sizes.read, 64),
            glimpses=times(sizes.glimpses, 64),
            clips=times(sizes.clips, 32),
            long=times(sizes.long, 16),
            asked=min(sizes.asked, times(sizes.asked, 4)),
            lengths=sizes.lengths if scale >= TRIAL else {"dwell": (LONG,), "scan": (LONG,)},
        )
        steps = {name: times(count) for name, count in STEPS.items()}
        return cls(steps, dataset, ROWS, seed)


def read_experiment(dataset: Path, recipe: VLM2Recipe) -> ConfigDict:
    """The base learns to read single frames, then to tell apart what several show."""
    reading, glimpses = (
        conversations(dataset, *sizes, 2 * recipe.rows) for sizes in (("read", 108, 8), ("glimpses", 128, 8))
    )
    read = stage("read", recipe.steps["read"], RATE, final_fraction=0.2, data=reading)
    glimpse = stage("glimpse", recipe.steps["glimpse"], RATE, final_fraction=0.2)
    return _experiment(dataset, recipe, None, [read, glimpse], glimpses)


def short_experiment(dataset: Path, recipe: VLM2Recipe, init: Path, memory: dict[str, Any] | None) -> ConfigDict:
    """Short videos: telling what they show, then questions. With a memory, whose banks are not trained, or without."""
    sizes = recipe.dataset
    data = [
        _videos(dataset, name, "clips", tokens, SHOWN, recipe.rows)
        for name, tokens in (("told", sizes.telling_tokens), ("clips", sizes.tokens))
    ]
    frozen = BANKS if memory else ()
    tell = stage("tell", recipe.steps["tell"], RATE, final_fraction=0.2, frozen=frozen, data=data[0])
    ask = stage("ask", recipe.steps["ask"], RATE, frozen=frozen)
    return _experiment(dataset, recipe, memory, [tell, ask], data[1], init)


def long_experiment(dataset: Path, recipe: VLM2Recipe, init: Path, memory: dict[str, Any]) -> ConfigDict:
    """Banks, which start from reading nothing, on longer videos of which SHOWN frames are kept."""
    data = _videos(dataset, "long", "long", recipe.dataset.tokens, LONG, recipe.rows)
    memorise = stage("memory", recipe.steps["memory"], RATE, trainable=BANKS)
    context = f"kept:{SHOWN}" if memory["episodic"] else f"stride:{LONG // SHOWN}"
    return _experiment(dataset, recipe, memory, [memorise], data, init, context)


def _videos(dataset: Path, name: str, store: str, tokens: int, frames: int, rows: int) -> dict[str, Any]:
    data = conversations(dataset, name, tokens, frames, rows)
    data["train"][0]["geometry"] = str(dataset / f"{store}.array_record")
    return data


def _experiment(
    dataset: Path,
    recipe: VLM2Recipe,
    memory: dict[str, Any] | None,
    stages: Sequence[dict[str, Any]],
    data: dict[str, Any],
    init: Path | None = None,
    context: str = "all",
) -> ConfigDict:
    return ConfigDict(
        common(dataset, stages, recipe.seed, init)
        | {
            "model": {"preset": PRESET, "memory": memory},
            "image": {"frames": LONG, "time_line": False, "strict_mask": True, "context": context},
            "data": data,
            "eval_every": 10_000,
        }
    )


def run_demo(workdir: Path, recipe: VLM2Recipe, comparing: bool = False, say: Say = print) -> dict[str, Any]:
    """The whole demo; gives what it writes to summary.json. Raises Interrupted where training was stopped."""
    start = time.perf_counter()
    demo = Workdir(workdir, say)
    say("1/5 Rendering videos of rooms with posters, questions about them, and a tokenizer")
    model = VLM(resolve({"preset": PRESET, "memory": BOTH}))
    shape, grid = model.tile.geometry, model.config.vision.grid
    demo.make_dataset(recipe.dataset, lambda folder, config: write_rooms(folder, config, shape, grid))
    say("2/5 Training a base without memory to read; it stands for a public model")
    base = demo.hand_over(demo.train("read", read_experiment(demo.dataset, recipe)))
    say("3/5 Going on with short videos: as it is, and with places in space (+3D)")
    demo.train("flat", short_experiment(demo.dataset, recipe, base, None))
    space = demo.train("space", short_experiment(demo.dataset, recipe, base, PLACED))
    memories = {"vlm2": BOTH}
    if comparing:
        memories |= {"working": BOTH | {"episodic": 0}, "episodic": BOTH | {"working": 0}}
    say(f"4/5 Training memories on videos of {LONG} frames, of which {SHOWN} are kept")
    for name, memory in memories.items():
        demo.train(name, long_experiment(demo.dataset, recipe, space, memory))
    rows = DEFAULT_ROWS | (COMPARED_ROWS if comparing else {})
    columns = [asked_name(motion, length) for motion, lengths in recipe.dataset.lengths.items() for length in lengths]
    dwelling = [asked_name("dwell", length) for length in recipe.dataset.lengths["dwell"]]
    middle, longest = dwelling[len(dwelling) // 2], dwelling[-1]
    asked = {name: Videos.read(demo.dataset, name) for name in columns}
    found, strips = {}, []
    for key, row in rows.items():
        with demo.timed("questions"):
            model = loaded(demo.workdir / row.where, row.memory or {})
            found[key] = {"what": row.what, "questions": {}, "coverage": {}}
            for name, videos in asked.items():
                shown = room_evaluate.show(model, videos, row.frames)
                said = room_evaluate.answers(model, videos, shown[0])
                found[key]["questions"][name] = room_evaluate.tally(videos, said)
                found[key]["coverage"][name] = room_evaluate.coverage(videos, shown[1])
                if name == longest:
                    clip, times_L = videos.clips[0], shown[1][0]
                    strips.append(Strip(row.what, clip.pixels_TSSc[times_L], times_L.tolist(), len(clip.pixels_TSSc)))
        say(f"{row.what}: {', '.join(f'{title(name)} {_percent(found[key], name)}' for name in columns)}")
    swept = {}
    if comparing:
        say(f"Asking with other numbers of entries, {title(middle)}")
        with demo.timed("questions"):
            swept = {rule: _sweep(demo.workdir / "vlm2", asked[middle], rule) for rule in ("paper", "pair")}
    say("5/5 Writing the report")
    train, heldout = load_digits()
    summary = {
        "vlm2": {
            "rows": found,
            "types": list(TYPES),
            "chance": CHANCE,
            "columns": columns,
            "middle": middle,
            "longest": longest,
            "swept": swept,
            "shown": SHOWN,
        },
        "dataset": {
            "train_digits": len(train.labels_N),
            "heldout_digits": len(heldout.labels_N),
            **to_dict(recipe.dataset),
        },
        "steps": {**recipe.steps, "total": sum(recipe.steps.values())},
    }
    summary["seconds"] = {**demo.seconds, "total": time.perf_counter() - start}
    demo.write("report.html", vlm2_report.render(summary, *_losses(demo.workdir), strips))
    demo.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _sweep(folder: Path, videos: Videos, rule: str) -> list[dict[str, Any]]:
    """What a memory answers with other numbers of entries than it was trained with."""
    found = []
    for working, episodic in itertools.product(*SWEPT):
        model = loaded(folder, {"working": working, "episodic": episodic, "write": rule})
        said = room_evaluate.answers(model, videos, room_evaluate.show(model, videos, "kept")[0])
        found.append({"working": working, "episodic": episodic, "questions": room_evaluate.tally(videos, said)})
    return found


def _losses(workdir: Path) -> tuple[dict[str, Curve], dict[str, int]]:
    """The loss of training of the base that goes on as it is and with places, and the first step of each stage."""
    read = workdir / "read"
    flat, marks = curves([read, workdir / "flat"])
    space, _ = curves([read, workdir / "space"])
    return {"as it is": flat["loss"]["training"], "with places": space["loss"]["training"]}, marks


def loaded(folder: Path, memory: dict[str, Any]) -> LoadedModel:
    """A model of the demo, some keys of its memory changed: none of them changes its parameters."""
    model = load_model(folder)
    if not memory:
        return model
    config = model.vlm.config
    changed = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **memory))
    return dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, config=changed))


def _percent(row: dict[str, Any], name: str) -> str:
    return percent(accuracy(row["questions"][name]))


def closing_words(summary: dict[str, Any], workdir: Path) -> str:
    """What to say at the end."""
    told = summary["vlm2"]
    rows, columns, middle = told["rows"], told["columns"], told["middle"]
    width = max(len(row["what"]) for row in rows.values())
    names = [column.rpartition("/")[2].replace("_", " ") for column in columns]

    def of(name: str, column: str = middle) -> str:
        return _percent(rows[name], column)

    def place(name: str) -> str:
        right, asked = rows[name]["questions"][middle].get("direction", (0, 0))
        return percent(right / asked if asked else None)

    return "\n".join(
        [
            "",
            f"Right answers about held-out rooms when {told['shown']} frames stand in the sequence:",
            f"  {''.ljust(width)}  {'  '.join(name.rjust(9) for name in names)}",
            *(
                f"  {row['what'].ljust(width)}  {'  '.join(_percent(row, name).rjust(9) for name in columns)}"
                for row in rows.values()
            ),
            f"{title(middle).capitalize()}: frames spread evenly {of('space')}, kept by the paper's rule {of('both')}, "
            f"by ours {of('pair')}, and {of('oracle')} where every poster is shown.",
            f"Directions, where every poster is shown: {place('oracle')} with places, {place('base_oracle')} without; "
            f"chance {percent(told['chance']['direction'])}.",
            *(
                f"{title(column).capitalize()}: spread evenly {of('space', column)}, kept by the paper's rule "
                f"{of('both', column)}, by ours {of('pair', column)}."
                for column in columns
                if column.startswith(asked_name("scan", 0)[:-1])
            ),
            "",
            f"{summary['seconds']['total'] / 60:.1f} minutes. The frames that are kept, and accuracy by type: "
            f"{workdir / 'report.html'}, every number: {workdir / 'summary.json'}",
        ]
    )
