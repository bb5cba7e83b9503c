"""Cuts, segments and frames of a video are those of MM-Mem's release, and what it only describes is as specified."""

import json

import numpy as np
import pytest

from vlmem_jax.agent.segments import Span, changes, clusters, evenly, frames_at_rate, prototypes, salient, split
from vlmem_jax.processing.scenes import SceneCuts


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "mm_mem"


@pytest.fixture(scope="module")
def sampling(folder):
    return json.loads((folder / "segmentation_sampling.json").read_text())


@pytest.fixture(scope="module")
def formula(folder):
    with np.load(folder / "formula_arrays.npz", allow_pickle=False) as arrays:
        return json.loads((folder / "formula.json").read_text()), dict(arrays)


def test_cuts(folder):
    with np.load(folder / "scene_cut_frames.npz", allow_pickle=False) as arrays:
        clips = dict(arrays)
    for case in json.loads((folder / "scene_cuts.json").read_text()):
        cuts = SceneCuts(case["min_scene_len"], case["threshold"])
        told, scores = [], []
        for frame_bgr in clips[case["clip"]]:
            told.append(cuts.push(frame_bgr[..., ::-1]))
            scores.append(cuts.score)
        found = [cut for cut in told if cut is not None]
        assert scores == case["content_val"] and found == case["cut_frames"]
        bounds = [0, *found, len(told)] if found else []
        scenes = [[start / case["fps"], end / case["fps"]] for start, end in zip(bounds, bounds[1:], strict=False)]
        np.testing.assert_allclose(np.array(scenes), np.array(case["scene_list_sec"]), rtol=0, atol=1e-9)


def test_segments(sampling):
    for case in sampling["split_segments"]:
        found = split(Span(case["start"], case["end"]), case["max_duration"])
        assert [list(span) for span in found] == case["segments"]
    for case in sampling["l1_segments"]:
        found = [
            (n, span) for n, scene in enumerate(case["scenes"]) for span in split(Span(*scene), case["max_duration"])
        ]
        wanted = [(one["source_scene_index"], (one["start_sec"], one["end_sec"])) for one in case["l1"]]
        assert found == wanted and [one["l1_index"] for one in case["l1"]] == list(range(len(found)))


def test_frames_of_a_window(sampling):
    for case in sampling["frame_sampling"]:
        span = Span(case["start_sec"], case["end_sec"])
        found = frames_at_rate(span, case["video_fps"], case["total_frames"], case["fps"])
        assert found.tolist() == case["frame_indices"]
        times = [n / case["video_fps"] for n in found.tolist()]
        assert times == case["timestamps"] and [f"frame_{time:.3f}.jpg" for time in times] == case["filenames"]
    for case in sampling["subsample"]:
        assert evenly(case["n"], case["max_frames"]).tolist() == case["indices"]


def test_salient_frames(formula):
    described, arrays = formula
    for case in described["saliency"]:
        change = changes(arrays[case["frames"]])
        np.testing.assert_allclose(change, case["d"], rtol=1e-12)
        np.testing.assert_allclose([change.mean(), change.std()], [case["mean"], case["std_population"]], rtol=1e-12)
        assert salient(change, case["k"]).tolist() == case["salient"]
        assert salient(change, case["k"], case["min_separation"]).tolist() == case["kept"]


def test_prototypes(formula):
    described, arrays = formula
    for case in described["prototypes"]:
        x = arrays[f"kmeans_{case['case']}_X"].astype(np.float64)
        assert prototypes(x, case["K"]).tolist() == case["prototypes"]
        assert clusters(x, min(case["K"], len(x)))[0].tolist() == case["labels"]
