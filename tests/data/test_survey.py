import numpy as np

from vlmem_jax.data import SourceConfig
from vlmem_jax.data.survey import glance, histogram, survey


def test_every_sample_is_counted_once_and_bad_ones_are_named(folder, processor):
    image = folder.image("a.png", 8, 8)
    lines = [folder.talk(), folder.talk(image=image), folder.talk(image=[image, image]), folder.talk(image="gone.png")]
    config = folder.config(*lines)
    found = survey(config.train, config, processor, 0)
    assert sorted(found.tiles.tolist()) == [1, 1, 2] and found.images == 3
    assert list(found.bad) == [f"{config.train[0].path}:4"] and "gone.png" in found.bad[f"{config.train[0].path}:4"]
    used = found.tokens.sum() / 300
    assert f"packed into 1 rows of 300 tokens and 8 tiles: tokens fill {used:.1%}, tiles fill 50.0%" in found.text()


def test_a_histogram_goes_by_powers_of_two():
    lines = histogram(np.array([0, 1, 2, 3, 3, 4, 7, 8, 9, 15, 15, 15]))
    assert [line.split()[:4] for line in lines] == [
        ["0", "to", "0", "1"],
        ["1", "to", "1", "1"],
        ["2", "to", "3", "3"],
        ["4", "to", "7", "2"],
        ["8", "to", "15", "5"],
    ]
    assert lines[-1].endswith(" " + "#" * 40) and lines[0].endswith(" " + "#" * 8)


def test_keys_that_are_not_read_are_counted(folder, processor):
    lines = [folder.talk() | {"width": 3, "tags": []}, folder.talk() | {"width": 4, "id": 7}, folder.talk()]
    source = SourceConfig(folder.jsonl(lines))
    found = survey([source], folder.config(), processor, 0)
    assert found.ignored == {"width": 2} and "keys that are not read: width (2 lines)" in found.text()
    assert "keys that are not read: width (2 lines)" in glance(source, 2).text()


def test_what_headers_do_not_tell_decoding_does(folder, processor):
    folder.image("whole.png", 64, 32)
    folder.image("half.png", 64, 32)
    folder.truncate("half.png")
    source = SourceConfig(folder.jsonl([folder.talk(image="whole.png"), folder.talk(image="half.png")]))
    for look in (
        lambda decode: glance(source, 2, decode),
        lambda decode: survey([source], folder.config(), processor, 0, decode),
    ):
        assert not look(False).bad
        [(name, reason)] = look(True).bad.items()
        assert name.endswith(":2") and "half.png is truncated or damaged" in reason
    assert "1 samples can be used, 1 cannot" in survey([source], folder.config(), processor, 0, True).text()
