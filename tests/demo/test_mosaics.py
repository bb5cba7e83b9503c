import numpy as np

from vlmem_jax.demo.mosaics import CELL, draw_mosaic, load_digits


def test_no_handwritten_digit_is_both_trained_and_held_out():
    train, heldout = load_digits()
    assert (len(train.labels_N), len(heldout.labels_N)) == (1400, 397)
    seen = {image.tobytes() for image in train.images_NSS}
    assert not any(image.tobytes() in seen for image in heldout.images_NSS)


def test_each_cell_shows_a_digit_of_its_label():
    train, _ = load_digits()
    mosaic = draw_mosaic(np.random.default_rng(0), train, (2, 1), 3)
    assert mosaic.image.size == (48, 24) and mosaic.digits_RC.shape == (3, 6) and mosaic.side == 3
    pixels = np.asarray(mosaic.image, np.float32)
    padded = np.pad(train.images_NSS.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    shifts = [padded[:, i : i + CELL, j : j + CELL] for i in range(3) for j in range(3)]
    candidates = np.concatenate(shifts).reshape(-1, CELL * CELL)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    labels = np.tile(train.labels_N, 9)
    for (row, column), digit in np.ndenumerate(mosaic.digits_RC):
        cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].ravel()
        assert labels[np.argmax(candidates @ cell)] == digit


def test_a_seed_gives_the_same_mosaic_again():
    train, _ = load_digits()
    first, second = (draw_mosaic(np.random.default_rng(3), train, (2, 2), 4) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.digits_RC == second.digits_RC).all()
