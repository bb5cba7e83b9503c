import numpy as np

from vlmem_jax.data.survey import histogram, survey


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
