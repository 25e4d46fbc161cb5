"""The cluttered digits: splits, labels and determinism, checked by looking for each digit in its image."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from s2d.lab import data
from s2d.lab.data import SOURCE_SIZE, SPLIT_SIZES, SPLITS, ClutteredDigits, source_digits, split_indices

DIGITS = load_digits()
# Each source digit by its pixels, as scikit-learn gives them: integers 0 to 16.
BY_PIXELS = {image.astype(np.uint8).tobytes(): index for index, image in enumerate(DIGITS.images)}


def intensities(images: torch.Tensor) -> np.ndarray:
    """Images in the units of the source, integers 0 to 16: zero is the darkest value of a set, 16 the brightest."""
    values = images.squeeze(1).double().numpy()
    values = 16 * (values - values.min()) / (values.max() - values.min())
    assert np.abs(values - values.round()).max() < 1e-4, "pixels are not those of the source"
    return values.round().astype(np.uint8)


def digits_in(image: np.ndarray) -> list[int]:
    """Source digits that some 8x8 window of an image shows exactly."""
    side = len(image) - SOURCE_SIZE + 1
    windows = (image[r : r + SOURCE_SIZE, c : c + SOURCE_SIZE] for r in range(side) for c in range(side))
    return [BY_PIXELS[key] for window in windows if (key := window.tobytes()) in BY_PIXELS]


def sources(images: torch.Tensor) -> list[int]:
    """The source digit of every image, of which there must be exactly one."""
    found = [digits_in(image) for image in intensities(images)]
    assert {len(f) for f in found} == {1}
    return [f[0] for f in found]


# --- source and splits ---


def test_the_source_digits_are_all_different() -> None:
    assert len(BY_PIXELS) == 1797  # so that a digit found in an image is the one that was pasted


def test_source_digits_are_scikit_learns() -> None:
    images, labels = source_digits()
    assert images.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_array_equal(images * 16, DIGITS.images)
    np.testing.assert_array_equal(labels, DIGITS.target)


def test_splits_are_disjoint_and_cover_everything() -> None:
    parts = [split_indices(split) for split in SPLITS]
    assert [len(part) for part in parts] == [SPLIT_SIZES[split] for split in SPLITS] == [1100, 200, 100, 397]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_every_class(split: str) -> None:
    share = np.bincount(DIGITS.target[split_indices(split)], minlength=10) / SPLIT_SIZES[split]
    assert 0.03 < share.min() and share.max() < 0.2


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="unknown split 'tests': choose one of train, validation, calibration, test"):
        split_indices("tests")
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        ClutteredDigits().fixed_set("tests", 4)


# --- images and labels ---


@pytest.mark.parametrize("recipe", [ClutteredDigits(), ClutteredDigits(fragments=0), ClutteredDigits(canvas=24)])
@pytest.mark.parametrize("split", SPLITS)
def test_fixed_set_shows_each_source_of_its_split_once(recipe: ClutteredDigits, split: str) -> None:
    images, labels = recipe.fixed_set(split)
    assert images.shape == (SPLIT_SIZES[split], 1, recipe.canvas, recipe.canvas)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    found = sources(images)
    assert sorted(found) == sorted(split_indices(split).tolist())
    assert labels.tolist() == DIGITS.target[found].tolist()


@pytest.mark.parametrize("n", [1, 99, 100, 101, 250, 400])
def test_fixed_set_shows_every_source_equally_often(n: int) -> None:
    images, labels = ClutteredDigits().fixed_set("calibration", n)
    assert images.shape == (n, 1, 16, 16) and labels.shape == (n,)
    found = sources(images)
    counts = Counter(found)
    assert set(counts) <= set(split_indices("calibration").tolist()) and len(counts) == min(n, 100)
    assert max(counts.values()) - min(counts[i] for i in split_indices("calibration").tolist()) <= 1
    assert labels.tolist() == DIGITS.target[found].tolist()


def test_the_same_digit_comes_in_different_places() -> None:
    images, _ = ClutteredDigits().fixed_set("calibration", 400)
    # Four rounds over the same 100 digits: no image twice.
    assert len({image.numpy().tobytes() for image in images}) == 400


def test_every_place_is_used() -> None:
    recipe = ClutteredDigits(canvas=10, fragments=0)
    shown = intensities(recipe.fixed_set("train")[0])
    corners = Counter()
    for image in shown:
        places = [(r, c) for r in range(3) for c in range(3) if image[r : r + 8, c : c + 8].tobytes() in BY_PIXELS]
        corners.update(places)
    assert set(corners) == {(r, c) for r in range(3) for c in range(3)}
    assert min(corners.values()) > 1100 / 9 * 0.7


def test_a_canvas_of_eight_is_the_digit_itself() -> None:
    images, labels = ClutteredDigits(canvas=8).fixed_set("test")
    np.testing.assert_array_equal(intensities(images), DIGITS.images[split_indices("test")].astype(np.uint8))
    assert labels.tolist() == DIGITS.target[split_indices("test")].tolist()


def test_without_fragments_there_is_nothing_but_the_digit() -> None:
    images, _ = ClutteredDigits(fragments=0).fixed_set("test")
    shown, found = intensities(images), sources(images)
    assert shown.sum((1, 2), dtype=int).tolist() == DIGITS.images[found].sum((1, 2)).astype(int).tolist()


def test_more_and_larger_fragments_are_more_clutter() -> None:
    def ink(**options) -> float:
        return intensities(ClutteredDigits(**options).fixed_set("test")[0]).mean()

    assert ink(fragments=0) < ink(fragments=2) < ink(fragments=4) < ink(fragments=4, fragment_size=8)


@pytest.mark.parametrize("split", SPLITS)
def test_clutter_comes_from_the_same_split(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits of the split become flat grey, all others flat white: no white may show."""
    marked = np.ones((1797, 8, 8), dtype=np.float32)
    marked[split_indices(split)] = 0.5
    labels = source_digits()[1]
    monkeypatch.setattr(data, "source_digits", lambda: (marked, labels))
    recipe = ClutteredDigits(fragments=6)
    assert len(recipe.fixed_set(split, 200)[0].unique()) == 2  # background and grey
    if split == "train":
        assert len(recipe.training_batch(200, seed=0, step=0)[0].unique()) == 2


def test_normalisation_is_the_same_for_every_set() -> None:
    values = [
        (images.min().item(), images.max().item())
        for images in (ClutteredDigits().fixed_set(split)[0] for split in SPLITS)
    ]
    assert len(set(values)) == 1
    images, _ = ClutteredDigits().fixed_set("train")
    assert abs(images.mean()) < 0.5 and 0.5 < images.std() < 2


# --- training batches ---


def test_training_batches_are_labelled_train_digits() -> None:
    images, labels = ClutteredDigits().training_batch(300, seed=1, step=2)
    assert images.shape == (300, 1, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    found = sources(images)
    assert set(found) <= set(split_indices("train").tolist())
    assert labels.tolist() == DIGITS.target[found].tolist()


def test_a_training_batch_is_a_function_of_seed_and_step() -> None:
    recipe = ClutteredDigits()
    images, labels = recipe.training_batch(16, seed=3, step=7)
    # Whatever was drawn before, here or by others, and on another instance.
    recipe.training_batch(16, seed=3, step=6)
    np.random.seed(0)
    torch.manual_seed(0)
    again, labels_again = ClutteredDigits().training_batch(16, seed=3, step=7)
    assert torch.equal(again, images) and torch.equal(labels_again, labels)
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(recipe.training_batch(16, seed=seed, step=step)[0], images)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    ClutteredDigits().training_batch(4, seed=0, step=0)
    ClutteredDigits().fixed_set("test", 4)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_steps_show_the_whole_training_split() -> None:
    seen = set()
    for step in range(40):
        seen.update(sources(ClutteredDigits().training_batch(200, seed=0, step=step)[0]))
    assert len(seen) > 0.99 * SPLIT_SIZES["train"]


def test_fixed_sets_depend_on_seed_and_split_only() -> None:
    recipe = ClutteredDigits()
    images, labels = recipe.fixed_set("validation", 50, seed=1)
    again, labels_again = recipe.fixed_set("validation", 50, seed=1)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    other, labels_other = recipe.fixed_set("validation", 50, seed=2)
    assert not torch.equal(images, other) and torch.equal(labels, labels_other)  # same digits, other clutter


def test_writing_to_a_set_does_not_reach_the_source() -> None:
    recipe = ClutteredDigits()
    images, labels = recipe.fixed_set("test", 20)
    kept, kept_labels = images.clone(), labels.clone()
    images.zero_()
    labels.zero_()
    again, labels_again = recipe.fixed_set("test", 20)
    assert torch.equal(again, kept) and torch.equal(labels_again, kept_labels)


DIGEST = """
import hashlib
from s2d.lab.data import ClutteredDigits
digest = hashlib.sha256()
recipe = ClutteredDigits()
for images, labels in (recipe.training_batch(8, seed=5, step=11), recipe.fixed_set("test"),
                       recipe.fixed_set("calibration", 130, seed=2)):
    digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
result = digest.hexdigest()
"""


def test_another_process_makes_the_same_data() -> None:
    here: dict = {}
    exec(DIGEST, here)
    command = [sys.executable, "-c", DIGEST + "print(result)"]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert there == here["result"] != hashlib.sha256().hexdigest()


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": 7}, "canvas is 7: a digit is 8 pixels wide"),
        ({"canvas": 0}, "canvas is 0"),
        ({"fragment_size": 0}, "fragment_size is 0: choose 1 to 8"),
        ({"fragment_size": 9}, "fragment_size is 9: choose 1 to 8"),
        ({"fragments": -1}, "fragments is -1: choose 0 or more"),
    ],
)
def test_recipes_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClutteredDigits(**options)


@pytest.mark.parametrize("options", [{"canvas": 8}, {"fragment_size": 1}, {"fragment_size": 8}, {"fragments": 0}])
def test_recipes_at_the_ends_of_their_range(options: dict) -> None:
    recipe = ClutteredDigits(**options)
    images, labels = recipe.training_batch(5, seed=0, step=0)
    assert images.shape == (5, 1, recipe.canvas, recipe.canvas) and len(labels) == 5
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("n", [0, -1])
def test_a_set_of_no_images(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}: ask for at least one image of the test split"):
        ClutteredDigits().fixed_set("test", n)
