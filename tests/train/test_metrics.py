import dataclasses
import io
import json
import struct
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from tests.train import standin
from vlmem_jax.flight.chips import CHIPS
from vlmem_jax.train import metrics
from vlmem_jax.train.config import StageConfig
from vlmem_jax.train.goodput import Goodput
from vlmem_jax.train.metrics import Recorder, Terminal

COUNTS = {"tokens": 60, "images": 3, "tiles": 5, "slots": 80, "flops": 200, "shape_flops": 250}


@pytest.fixture
def clock(monkeypatch):
    """Time that moves when told to."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1000.0)
    return now


def recorder_of(folder, steps=10, log_every=1, done=0, before=1):
    """The recorder of stage `s`, and its clock."""
    stages = StageConfig("earlier", before, 0.1), StageConfig("s", steps, 0.1)
    experiment = dataclasses.replace(standin.experiment(log_every=log_every), stages=stages)
    clock = Goodput()
    return Recorder(folder, experiment, stages[1], done, clock), clock


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_are_those_of_the_steps_since_the_last_record(tmp_path, clock):
    recorder, spending = recorder_of(tmp_path, log_every=2)
    for step in range(1, 7):
        with spending.spent("step"):
            clock[0] += 0.5
        if step == 5:
            with spending.spent("evaluation"):
                clock[0] += 30
        recorder.step(step, {"loss": float(step)}, COUNTS)
    recorder.close()
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6]
    first, *others = records(tmp_path)
    for record in (first, *others):  # the first step, which compiles, counts nowhere; nor does the pause
        assert record["tokens_per_s"] == 120 and record["images_per_s"] == 6 and record["tiles_per_s"] == 10
        assert record["mfu"] == pytest.approx(200 * 2 / 1000)
        assert record["utilisation"] == pytest.approx(250 * 2 / 1000) and "flops_per_s" not in record
        assert record["fill"] == 0.75
    assert others[-1]["seconds/step"] == 3 and others[-1]["seconds/evaluation"] == 30
    assert others[-1]["goodput"] == pytest.approx(3 / 33)


def test_the_last_step_is_always_recorded(tmp_path, clock):
    recorder, _ = recorder_of(tmp_path, steps=3, log_every=100)
    for step in (1, 2, 3):
        clock[0] += 1
        recorder.step(step, {"loss": 1.0}, COUNTS)
    recorder.close()
    assert [record["step"] for record in records(tmp_path)] == [3]


def test_going_on_forgets_what_was_not_saved(tmp_path):
    lines = [{"stage": "a", "step": 4}, {"stage": "s", "step": 1}, {"stage": "s", "step": 2}, {"stage": "s", "step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "s", "st')
    recorder_of(tmp_path, done=2)[0].close()
    assert records(tmp_path) == lines[:3]


def test_plain_lines_where_there_is_no_terminal():
    text = io.StringIO()
    terminal = Terminal("finetune", 100, 0, Console(file=text, width=40, soft_wrap=True))
    values = {"loss": 1.23456, "tokens_per_s": 12_345.0, "mfu": 0.314, "utilisation": 0.4, "steps_per_s": 0.01}
    terminal.show(25, values)
    terminal.close()
    assert text.getvalue() == "finetune 25/100  loss 1.2346  tokens/s 12.3k  MFU 31.4%  of shapes 40.0%  ETA 2:05:00\n"


def test_a_bar_in_a_terminal():
    text = io.StringIO()
    terminal = Terminal("finetune", 100, 20, Console(file=text, width=120, force_terminal=True))
    terminal.show(25, {"loss": 1.23456, "images_per_s": 7.0})
    terminal.close()
    assert "25/100" in text.getvalue() and "loss 1.2346  images/s 7" in text.getvalue()


def test_tensorboard_gets_every_number(tmp_path):
    recorder, _ = recorder_of(tmp_path, done=3, before=100)
    recorder.write(4, {"loss": 2.5, "gate/attn/1": 0.125})
    recorder.close()
    data, events = next((tmp_path / "tensorboard").iterdir()).read_bytes(), []
    while data:  # TFRecord: length, its checksum, that many bytes, their checksum
        (length,) = struct.unpack("Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[1].session_log.status == 1 and events[1].step == 104, "later points of a killed run are dropped"
    assert events[2].step == 104
    assert {value.tag: value.simple_value for value in events[2].summary.value} == {
        "train/loss": 2.5,
        "gate/attn/1": 0.125,
    }


def test_the_peak_of_this_machine_is_measured():
    metrics.peak_flops.cache_clear()
    assert 1e8 < metrics.peak_flops() < 1e14


@pytest.mark.parametrize("kind, chip", [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e")])
def test_training_and_the_flight_check_count_with_one_peak(monkeypatch, kind, chip):
    monkeypatch.setattr(metrics.jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind=kind)])
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 8)
    assert metrics.peak_flops.__wrapped__() == 8 * CHIPS[chip].peak.flops
