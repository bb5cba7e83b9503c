"""Plans that are kept: the same rows as plans that are made, and only where data and config are the same."""

import dataclasses
import json
import os

import pytest

from tests.data.test_plan import mixed_lines
from vlmem_jax.data import DataConfig, Plan, SourceConfig, TrainData, store
from vlmem_jax.data.samples import Samples
from vlmem_jax.processing import TileProcessor
from vlmem_jax.types import TileGeometry


def rows(plan):
    return [plan.row(i) for i in range(len(plan))]


@pytest.fixture
def measured(monkeypatch):
    """The samples measured so far, in a list that may be cleared."""
    seen, measure = [], Samples._measure
    monkeypatch.setattr(Samples, "_measure", lambda self, key: seen.append(key) or measure(self, key))
    return seen


def kept(folder, config, processor, count, seed=0):
    """A plan brought to `count` rows in the folder `plans`, and what was said of it."""
    plan = Plan.train(config, processor, seed)
    return plan, store(plan, folder.path / "plans", count)


def test_a_kept_plan_measures_nothing_and_is_the_same(folder, processor, measured):
    config = folder.config(*mixed_lines(folder, 60))
    made, line = kept(folder, config, processor, 20)
    assert "made in" in line and "there was none for these data and this config" in line and measured
    measured.clear()
    loaded, line = kept(folder, config, processor, 20)
    assert not measured and line.startswith("the pack plan is that of")
    assert rows(loaded) == rows(made) and loaded.fingerprint(20) == made.fingerprint(20)
    assert loaded.fill == made.fill and loaded.report() == made.report()
    ours, theirs = TrainData(loaded, 10), TrainData(Plan.train(config, processor, 0), 10)
    assert ours[9].sample_ids == theirs[9].sample_ids and ours[9].denominator == theirs[9].denominator


def test_a_longer_plan_goes_on_where_the_kept_one_ended(folder, processor, measured):
    config = folder.config(*mixed_lines(folder, 60))
    kept(folder, config, processor, 5)
    known = set(measured)
    measured.clear()
    longer, line = kept(folder, config, processor, 40)
    assert "it had 5 rows" in line and not known & set(measured)
    fresh = Plan.train(config, processor, 0)
    fresh.extend(40)
    assert rows(longer) == rows(fresh) and longer.fill == fresh.fill
    assert "is that of" in kept(folder, config, processor, 40)[1]


def test_a_whole_pass_is_kept_whole(folder, processor, measured):
    config = folder.config(eval=mixed_lines(folder, 40))
    made, loaded = Plan.eval(config, processor), Plan.eval(config, processor)
    store(made, folder.path)
    measured.clear()
    assert "is that of" in store(loaded, folder.path)
    loaded.extend()
    assert rows(loaded) == rows(made) and not measured
    with pytest.raises(IndexError, match="the plan ends after"):
        loaded.row(len(loaded))


def test_skipped_samples_are_kept_with_their_reasons(folder, processor):
    config = folder.config(folder.talk(), "{oops", folder.talk(image="gone.png"), on_bad_sample="skip")
    made, loaded = kept(folder, config, processor, 4)[0], kept(folder, config, processor, 4)[0]
    assert loaded.skipped == made.skipped and len(loaded.skipped) == 2
    assert kept(folder, config, processor, 4)[1].endswith("remove it to look at 2 samples again")
    assert rows(loaded) == rows(made)


def test_another_config_is_another_plan_and_both_stay(folder, processor):
    config = folder.config(*mixed_lines(folder, 60))
    other = dataclasses.replace(config, pack_tokens=250)
    first, second = kept(folder, config, processor, 9)[0], kept(folder, other, processor, 9)[0]
    assert rows(first) != rows(second)
    assert len(list((folder.path / "plans").iterdir())) == 2
    for settings, plan in ((config, first), (other, second)):
        again, line = kept(folder, settings, processor, 9)
        assert "is that of" in line and rows(again) == rows(plan)
    image = dataclasses.replace(processor.image, max_tiles=2)
    assert (
        "none" in kept(folder, config, TileProcessor(processor.tokenizer, image, TileGeometry(8, 2), system="s"), 9)[1]
    )
    assert "none" in kept(folder, config, processor, 9, seed=1)[1]
    how = dataclasses.replace(config, threads=1, prefetch=7, rows=3, loss_weight="token", jpeg_augment=True)
    assert "is that of" in kept(folder, how, processor, 9)[1]  # these change no row


def test_a_changed_file_makes_a_new_plan_and_says_so(folder, processor):
    lines = mixed_lines(folder, 30)
    config = folder.config(*lines)
    kept(folder, config, processor, 5)
    folder.jsonl(lines[1:])
    plan, line = kept(folder, config, processor, 5)
    assert f"{config.train[0].path} changed, so a run that goes on" in line
    fresh = Plan.train(config, processor, 0)
    fresh.extend(5)
    assert rows(plan) == rows(fresh)
    os.utime(config.train[0].path, (0, 0))  # the content counts, not the time
    assert "is that of" in kept(folder, config, processor, 5)[1]


def test_another_tokenizer_makes_a_new_plan(folder, processor, tmp_path, monkeypatch):
    config = folder.config(*mixed_lines(folder, 30))
    kept(folder, config, processor, 5)
    monkeypatch.setattr(type(processor.tokenizer), "digest", lambda self: "another")
    assert "the tokenizer changed" in kept(folder, config, processor, 5)[1]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[1]\n"])
def test_a_damaged_file_is_made_again(folder, processor, damage):
    config = folder.config(*mixed_lines(folder, 30))
    made, _ = kept(folder, config, processor, 5)
    [file] = (folder.path / "plans").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again, line = kept(folder, config, processor, 5)
    assert "cannot be read" in line and rows(again) == rows(made)
    assert "is that of" in kept(folder, config, processor, 5)[1]


def test_a_folder_that_cannot_be_written_is_named(folder, processor):
    (folder.path / "plans").write_text("a file")
    with pytest.raises(OSError, match="the pack plan cannot be kept in .*plans/.*: "):
        kept(folder, folder.config(folder.talk()), processor, 2)


def test_nothing_is_kept_of_a_plan_that_failed(folder, processor):
    config = folder.config(folder.talk(), "{oops")
    with pytest.raises(ValueError, match="train.jsonl:2"):
        kept(folder, config, processor, 5)
    assert not (folder.path / "plans").exists()


def test_an_image_that_changed_names_the_file_to_remove(folder, processor):
    config = folder.config(folder.talk(image=folder.image("a.png", 8, 8)))
    kept(folder, config, processor, 12)
    folder.image("a.png", 16, 8)
    plan, _ = kept(folder, config, processor, 12)
    with pytest.raises(ValueError, match=r"must not change .*train.jsonl:1\); remove .*plans/\w+.plan and start again"):
        TrainData(plan, 6)[0]


class Host(TrainData):
    """One of `hosts`, with an equal share of the rows of every step."""

    def __init__(self, plan, steps, host, hosts):
        self.host, self.hosts = host, hosts
        super().__init__(plan, steps)

    def _rows_of_step(self, mesh):
        share = self.config.rows // self.hosts
        return list(range(self.host * share, (self.host + 1) * share))


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_hosts_see_every_sample_once_whatever_their_number_before_and_after(folder, processor, stop):
    lines = mixed_lines(folder, 60)
    config = folder.config(*lines[:40], rows=8)
    extra = SourceConfig(folder.jsonl(lines[40:], "extra.jsonl"), weight=2.0)
    config = dataclasses.replace(config, train=(*config.train, extra))
    steps = 9
    whole = kept(folder, config, processor, steps * config.rows)[0]

    def seen(hosts, first, last):
        """Names of the samples of some steps, by step, over all hosts."""
        names = {step: [] for step in range(first, last)}
        for host in range(hosts):
            plan, line = kept(folder, config, processor, steps * config.rows)
            assert "is that of" in line
            data = Host(plan, steps, host, hosts)
            for step in range(first, last):
                names[step] += data[step].sample_ids
        return names

    expected = {
        step: sorted(whole.samples.name(key) for row in range(step * 8, step * 8 + 8) for key in whole.row(row))
        for step in range(steps)
    }
    for before, after in ((1, 4), (4, 2), (2, 1)):
        log = seen(before, 0, stop) | seen(after, stop, steps)
        assert {step: sorted(names) for step, names in log.items()} == expected


def test_a_plan_holds_numbers_and_text_alone(folder, processor):
    config = folder.config(*mixed_lines(folder, 30))
    kept(folder, config, processor, 5)
    [file] = (folder.path / "plans").iterdir()
    head, _, content = file.read_bytes().partition(b"\n")
    assert json.loads(head)[0].keys() == {config.train[0].path, "the tokenizer"}
    assert content.startswith(b"PK") and b"pickle" not in content


def test_plan_folder_is_a_key_of_data():
    assert DataConfig(plan_folder="cache").plan_folder == "cache"
