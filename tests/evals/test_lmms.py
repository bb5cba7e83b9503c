"""The adapter, through lmms-eval itself and a task of three questions."""

import base64
import io
import json
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evals import world
from vlmem_jax.generate import InvocationConfig, Pool, Request, SamplingConfig, Transcript

pytest.importorskip("lmms_eval", exc_type=ImportError)
evaluator = pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)

from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402 - only where it is installed
from lmms_eval.tasks import TaskManager  # noqa: E402

from vlmem_jax.evals.answers import random_keys  # noqa: E402
from vlmem_jax.evals.lmms import LmmsModel, cut, sampling_of  # noqa: E402
from vlmem_jax.evals.plugin import MANIFEST  # noqa: E402

NEW = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return world.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def task(checkpoint, tmp_path_factory):
    """A folder with a task `vlmem_tiny`, and its documents."""
    folder = tmp_path_factory.mktemp("task")
    texts = [base64.b64encode((checkpoint / f"{n}.png").read_bytes()).decode() for n in range(2)]
    shown = [texts[:1], texts[1:], texts]
    docs = [
        {"question": "abc"[n] + "? <image> <|im_end|>", "answer": "a", "shown": images}
        for n, images in enumerate(shown)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "utils.py").write_text(
        textwrap.dedent("""
            import base64, io
            from PIL import Image

            def visual(doc):
                return [Image.open(io.BytesIO(base64.b64decode(text))) for text in doc["shown"]]

            def text(doc, lmms_eval_specific_kwargs=None):
                return doc["question"]

            def scored(doc, results):
                return {"says_a": float("a" in results[0].lower())}
            """)
    )
    (folder / "vlmem_tiny.yaml").write_text(
        textwrap.dedent(f"""
            task: vlmem_tiny
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
            test_split: test
            output_type: generate_until
            doc_to_visual: !function utils.visual
            doc_to_text: !function utils.text
            doc_to_target: answer
            process_results: !function utils.scored
            generation_kwargs: {{max_new_tokens: {NEW}, temperature: 1.0, do_sample: true, until: ["\\n\\n", "g"]}}
            metric_list: [{{metric: says_a, aggregation: mean, higher_is_better: true}}]
            """)
    )
    return folder, docs


@pytest.mark.parametrize("mode", ["learned", "never"])
def test_a_task_gets_the_answers_of_each_prompt_alone(checkpoint, task, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder, docs = task
    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)
    found = evaluator.simple_evaluate(
        model="vlmem",
        model_args=f"checkpoint={checkpoint},mode={mode},seed=2",
        tasks=["vlmem_tiny"],
        batch_size=2,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    model = LmmsModel(str(checkpoint), mode=mode)
    outputs = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["vlmem_tiny"]}
    sampling, processor, pool = SamplingConfig(NEW, 1.0), model.loaded.processor, Pool(model.generator, 1)
    for n, doc in enumerate(docs):
        images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in doc["shown"]]
        [key_2] = np.asarray(jax.random.key_data(random_keys(2, [(n,)])))
        asked = Request(processor.prompt(doc["question"], images), sampling, InvocationConfig(mode), key_2)
        transcript = Transcript(processor.tokenizer, model.loaded.vlm.speech)
        for token in pool.submit([asked])[0].result():
            transcript.push(token)
        transcript.flush()
        assert outputs[n] == transcript.text.partition("g")[0]
    says_a = [float("a" in outputs[n].lower()) for n in range(3)]
    assert found["results"]["vlmem_tiny"]["says_a,none"] == pytest.approx(sum(says_a) / 3)


def test_model_args_say_how_videos_are_shown(tmp_path):
    folder = world.frames_checkpoint(tmp_path)
    parts = [{"type": "video", "url": str(folder / "a.mp4")}, {"type": "text", "text": "What?"}]
    request = SimpleNamespace(args=("", lambda doc: [{"role": "user", "content": parts}], {}, 0, "task", "test"))

    def asked(**model_args):
        model = LmmsModel(str(folder), **model_args)
        model.task_dict = {"task": {"test": [None]}}
        sample = model._sample(request)
        return len(sample.pixels_ISSc), model.loaded.processor.tokenizer.decode(sample.tokens_T)

    frames, text = asked()
    assert frames == 4 and "and 4 frames are uniformly sampled" in text
    frames, text = asked(frames=2, time_line=False)
    assert frames == 2 and "What?" in text and "sampled" not in text
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        asked(frames=0)


def test_settings_of_tasks():
    assert sampling_of({}) == SamplingConfig()
    assert sampling_of({"do_sample": True, "top_p": None}).temperature == 1.0
    assert sampling_of({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert sampling_of({"temperature": 0.5, "top_k": 4, "max_new_tokens": 3}) == SamplingConfig(3, 0.5, 4)
    with pytest.raises(ValueError, match="num_beams must be 1, got 4"):
        sampling_of({"num_beams": 4})
    assert cut("a\n\nb;c", ["\n\n", ";"]) == "a\n\nb" and cut("ab", None) == "ab" and cut("a.b", ".") == "a"


def test_what_cannot_be_done_is_said(checkpoint):
    with pytest.raises(ValueError, match="unknown key model_args.moed; did you mean model_args.mode"):
        LmmsModel(str(checkpoint), moed="never")
    model = LmmsModel(str(checkpoint))
    request = SimpleNamespace(args=("Say", "a"))
    with pytest.raises(ValueError, match="but model_args mode is learned; set mode=never"):
        model.loglikelihood([request])


def test_choices_are_compared_by_their_loss_as_answers(checkpoint):
    model = LmmsModel(str(checkpoint), batch_size=2, mode="never")
    docs = [{"image": Image.open(checkpoint / f"{n}.png").convert("RGB"), "answer": "bc"} for n in range(2)]
    model.task_dict = {"task": {"test": docs}}

    def request(text, doc_id):
        return SimpleNamespace(args=("What?", text, shown, doc_id, "task", "test"))

    def shown(doc):
        return [doc["image"]]

    def target(doc):
        return doc["answer"]

    asked = [("a", 0), ("bc", 0), (target, 0), ("", 0), ("a", 1)]
    plain = SimpleNamespace(args=("What?", "a"))
    found = model.loglikelihood([*(request(*of) for of in asked), plain])
    processor = model.loaded.processor
    prompts = [processor.prompt("What?", [doc["image"]]) for doc in docs] + [processor.prompt("What?")]
    ids = [[processor.tokenizer.encode(text) for text in texts] for texts in (["a", "bc"], ["a"], ["a"])]
    expected = model.answering.likelihoods(prompts, ids, model.invocation)
    losses = [-one.logp for each in expected for one in each]
    assert [loss for loss, _ in found] == pytest.approx([*losses[:2], losses[1], 0, *losses[2:]])
    assert found[3] == (0.0, True) and len({loss for loss, _ in found}) == 5
    assert model.loglikelihood([]) == []
