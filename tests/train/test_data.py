"""The data: every source, the split, the order, the position of the iterator, and every error."""

from __future__ import annotations

import itertools
import json
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import grain
import numpy as np
import pytest

from pdjax import data
from pdjax.data import synthetic

every_source = pytest.mark.parametrize("source", data.SOURCES)


def fingerprints(examples: Iterable[data.Example]) -> list[bytes]:
    return [example["x"].tobytes() + example["y"].tobytes() for example in examples]


def first(dataset: Iterable[data.Example], num_examples: int) -> list[bytes]:
    return fingerprints(itertools.islice(dataset, num_examples))


def get(dataset: grain.MapDataset[data.Example], index: int) -> data.Example:
    """The example, which is there, because nothing in these data sets filters examples out."""
    example = dataset[index]
    assert example is not None
    return example


def write_files(directory: Path, num_files: int, num_bytes: int) -> str:
    """Writes files of one byte value each, its number; returns the glob of them."""
    for i in range(num_files):
        (directory / f"{i}.txt").write_bytes(bytes([i]) * num_bytes)
    return str(directory / "*.txt")


@every_source
def test_examples_look_as_their_kind_says(source: str):
    dataset = data.load(source, seed=0, sequence_length=16)
    assert dataset.name == source
    assert dataset.kind == data.SOURCES[source].kind
    assert dataset.description
    for example in (get(dataset.train, 0), get(dataset.test, 0)):
        x, y = example["x"], example["y"]
        assert isinstance(x, np.ndarray)
        assert isinstance(y, np.ndarray)
        assert y.dtype == np.int32
        assert 0 <= y.min() <= y.max() < dataset.num_classes
        if dataset.kind == "text":
            assert x.dtype == np.int32
            assert x.shape == y.shape == (16,)
            assert (x[1:] == y[:-1]).all()
        else:
            assert x.dtype == np.float32
            assert x.ndim == 3
            assert y.shape == ()


@every_source
def test_same_seed_same_order_and_other_seed_other_order(source: str):
    orders = [first(data.load(source, seed=seed).train, 20) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize("source", ["stdlib", "digits"])
def test_split_and_test_order_of_real_data_do_not_depend_on_the_seed(source: str):
    a, b = (data.load(source, seed=seed).test for seed in (0, 1))
    assert len(a) == len(b)
    assert first(a, 300) == first(b, 300)


@pytest.mark.parametrize("source", ["digits", "synthetic-text", "synthetic-images"])
def test_train_and_test_are_disjoint_and_an_epoch_has_each_example_once(source: str):
    dataset = data.load(source, seed=0, image_size=None)
    num_train = {"digits": 1437}.get(source, synthetic.NUM_TRAIN)
    train = first(dataset.train, num_train)
    test = fingerprints(dataset.test)
    assert len(set(train)) == num_train
    assert not set(train) & set(test)


def test_epochs_have_orders_of_their_own():
    zero, one = (data.load("digits", seed=seed).train for seed in (0, 1))
    epoch_size = 1437
    first_epoch, second_epoch = (
        fingerprints(get(zero, i) for i in range(epoch * epoch_size, (epoch + 1) * epoch_size))
        for epoch in (0, 1)
    )
    assert sorted(first_epoch) == sorted(second_epoch)
    assert first_epoch != second_epoch
    # grain seeds epoch e with seed + e: neighbouring seeds must not share orders all the same
    assert second_epoch != first(one, epoch_size)


def test_stdlib_is_the_library_alone():
    dataset = data.load("stdlib", seed=0)
    root = Path(sysconfig.get_path("stdlib"))
    ours = [p for p in root.rglob("*.py") if not {"site-packages", "__pycache__"} & {*p.parts}]
    assert f"{sum(p.stat().st_size for p in ours):,} bytes of text in {len(ours):,} files" in (
        dataset.description
    )
    assert dataset.num_classes == 256
    total = sum(p.stat().st_size for p in ours)
    assert 0.03 < len(dataset.test) * 128 / total <= 0.05


def test_whole_files_are_held_out(tmp_path: Path):
    dataset = data.load(write_files(tmp_path, 100, 1000), seed=0, sequence_length=50)
    test = {int(value) for example in dataset.test for value in example["y"]}
    epoch = (95 * 1000 - 1) // 50
    train = {
        int(value) for example in itertools.islice(dataset.train, epoch) for value in example["x"]
    }
    assert len(test) == 5
    assert train == set(range(100)) - test


def test_split_does_not_depend_on_where_the_files_are(tmp_path: Path):
    splits = []
    for name in ("a", "b/c"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        dataset = data.load(write_files(directory, 40, 100), seed=0, sequence_length=10)
        splits.append(fingerprints(dataset.test))
    assert splits[0] == splits[1]


def test_end_of_a_single_file_is_held_out(tmp_path: Path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(i // 100 for i in range(10_000)))
    dataset = data.load(str(path), seed=0, sequence_length=9)
    test = np.concatenate([example["x"] for example in dataset.test])
    assert set(test.tolist()) == {95, 96, 97, 98, 99}
    assert len(dataset.test) == 499 // 9
    train = np.concatenate([get(dataset.train, i)["y"] for i in range(9499 // 9)])
    assert set(train.tolist()) == set(range(95))


def test_short_text_holds_out_one_example(tmp_path: Path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(range(22)))
    dataset = data.load(str(path), seed=0, sequence_length=10)
    assert [example["x"].tolist() for example in dataset.test] == [list(range(11, 21))]
    assert get(dataset.train, 0)["y"].tolist() == list(range(1, 11))


def test_full_windows_cover_the_corpus(tmp_path: Path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(range(201)))  # 190 to train on, whose last target is its last byte
    dataset = data.load(str(path), seed=0, sequence_length=10)
    two_epochs = [get(dataset.train, i) for i in range(2 * 18)]
    assert {len(example["y"]) for example in two_epochs} == {10}
    starts = sorted(int(example["x"][0]) for example in two_epochs)
    assert starts == sorted(2 * list(range(0, 180, 10)))


def test_name_of_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "corpus").write_bytes(b"x" * 100)
    monkeypatch.chdir(tmp_path)
    assert data.load("corpus", seed=0, sequence_length=8).name == "corpus"


def test_any_bytes_are_text(tmp_path: Path):
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00" * 100)
    assert get(data.load(str(path), seed=0, sequence_length=8).train, 0)["x"].max() == 255


def test_glob_of_directories_at_any_depth(tmp_path: Path):
    for name in ("a.txt", "b/c.txt", "b/d/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 100)
    dataset = data.load(str(tmp_path / "**/*.txt"), seed=0, sequence_length=8)
    assert "300 bytes of text in 3 files" in dataset.description


def test_digits_are_stratified_and_scaled():
    test = data.load("digits", seed=0).test
    labels = np.array([example["y"] for example in test])
    images = np.array([example["x"] for example in test])
    assert images.shape == (360, 8, 8, 1)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert np.bincount(labels).min() >= 34
    assert np.bincount(labels).max() <= 38


def test_digits_are_enlarged_by_repeating_pixels():
    small = get(data.load("digits", seed=3).train, 0)["x"]
    large = get(data.load("digits", seed=3, image_size=32).train, 0)["x"]
    assert large.shape == (32, 32, 1)
    assert (large == np.kron(small[..., 0], np.ones((4, 4)))[..., None]).all()


def test_a_batch_cannot_change_the_data():
    dataset = data.load("digits", seed=0)
    batch = next(data.batches(dataset.test, 1))
    before = fingerprints([get(dataset.test, 0)])
    batch["x"][:] = 7
    assert fingerprints([get(dataset.test, 0)]) == before


def test_synthetic_text_is_a_markov_chain():
    dataset = data.load("synthetic-text", seed=0)
    counts = np.zeros((synthetic.VOCAB_SIZE, synthetic.VOCAB_SIZE))
    for example in itertools.islice(dataset.train, 1000):
        np.add.at(counts, (example["x"], example["y"]), 1)
    shares = np.sort(counts / counts.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    assert ((counts > 0).sum(axis=1) == 4).all()
    assert np.allclose(shares[:, :4].mean(axis=0), synthetic.TRANSITION_PROBABILITIES, atol=0.01)
    assert synthetic.lowest_text_loss() == pytest.approx(1.2130, abs=1e-4)
    test = np.concatenate([counts[example["x"], example["y"]] for example in dataset.test])
    assert (test > 0).all()


def test_synthetic_images_are_near_their_prototypes():
    dataset = data.load("synthetic-images", seed=0, image_size=8)
    examples = list(itertools.islice(dataset.train, 400))
    images = np.stack([example["x"] for example in examples])
    labels = np.array([example["y"] for example in examples])
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    tests = list(itertools.islice(dataset.test, 100))
    distances = [((means - example["x"]) ** 2).sum(axis=(1, 2, 3)) for example in tests]
    right = np.argmin(distances, axis=1) == [int(example["y"]) for example in tests]
    assert images.shape[1:] == (8, 8, 3)
    assert right.mean() > 0.95


def test_batches_stack_the_examples_in_order():
    dataset = data.load("digits", seed=0)
    batches = list(itertools.islice(data.batches(dataset.train, 3), 2))
    for key in ("x", "y"):
        expected = np.stack([get(dataset.train, i)[key] for i in range(6)])
        assert (np.concatenate([batch[key] for batch in batches]) == expected).all()
        assert batches[0][key].dtype == expected.dtype


def test_batches_of_finite_data_are_full_and_end():
    batches = list(data.batches(data.load("digits", seed=0).test, 50))
    assert [len(batch["y"]) for batch in batches] == [50] * 7


def test_batches_of_endless_data_run_across_epochs():
    batches = data.batches(data.load("digits", seed=0).train, 1000)
    assert [len(next(batches)["y"]) for _ in range(4)] == [1000] * 4


@pytest.mark.parametrize("source", ["digits", "synthetic-text"])
@pytest.mark.parametrize("num_before", [0, 3, 50])  # 50 × 32 lies in the second epoch of digits
def test_position_can_be_saved_and_restored(source: str, num_before: int):
    batches = data.batches(data.load(source, seed=0).train, 32)
    for _ in range(num_before):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = first(batches, 3)
    other = data.batches(data.load(source, seed=0).train, 32)
    next(other)
    other.set_state(state)
    assert first(other, 3) == expected
    batches.set_state(state)
    assert first(batches, 3) == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sdtlib", "unknown data source 'sdtlib', did you mean 'stdlib'.*digits, synthetic-text"),
        ("xyz", r"unknown data source 'xyz'; the sources are stdlib.*'path/\*.txt'"),
        ("nowhere/*.txt", r"no file matches 'nowhere/\*.txt', expected"),
        ("nowhere.txt", "no file matches 'nowhere.txt', expected"),
    ],
)
def test_unknown_source(source: str, message: str):
    with pytest.raises(ValueError, match=message):
        data.load(source, seed=0)


def test_directory_is_not_a_file(tmp_path: Path):
    with pytest.raises(ValueError, match="a directory alone does not count"):
        data.load(str(tmp_path), seed=0)


def test_unreadable_file(tmp_path: Path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match=r"cannot read .*gone\.txt: No such file"):
        data.load(str(tmp_path / "*.txt"), seed=0)


@pytest.mark.parametrize("num_bytes", [0, 10, 21])
def test_too_little_text_names_the_file_and_the_sizes(tmp_path: Path, num_bytes: int):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * num_bytes)
    with pytest.raises(
        ValueError, match=rf"short\.txt \({num_bytes} bytes\), expected at least 22"
    ):
        data.load(str(path), seed=0, sequence_length=10)


def test_too_little_text_in_many_files_names_a_few(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got 9 bytes of text in .*, 4 more, expected") as error:
        data.load(write_files(tmp_path, 9, 1), seed=0)
    assert str(error.value).count("(1 bytes)") == 5


@pytest.mark.parametrize("image_size", [-8, 0, 4, 12])
def test_digits_refuse_sizes_that_are_not_multiples_of_8(image_size: int):
    with pytest.raises(ValueError, match=f"image_size={image_size} .* a multiple of 8"):
        data.load("digits", seed=0, image_size=image_size)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    for module in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        data.load("digits", seed=0)


def test_library_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"found no \.py file of the standard library in"):
        data.load("stdlib", seed=0)


@every_source
def test_wrong_arguments(source: str):
    with pytest.raises(ValueError, match="seed=-1, expected 0 or more"):
        data.load(source, seed=-1)
    if data.SOURCES[source].kind == "text":
        with pytest.raises(ValueError, match="sequence_length=0, expected at least 1"):
            data.load(source, seed=0, sequence_length=0)
        with pytest.raises(ValueError, match=r"image_size=8 .* which is text.*synthetic-images"):
            data.load(source, seed=0, image_size=8)
    else:
        with pytest.raises(ValueError, match="image_size=0"):
            data.load(source, seed=0, image_size=0)


@pytest.mark.parametrize("batch_size", [-1, 0, 361])
def test_batch_size_must_fit_the_test_data(batch_size: int):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}, expected from 1 to 360"):
        data.batches(data.load("digits", seed=0).test, batch_size)


def test_batch_size_must_fit_an_epoch_of_the_training_data():
    with pytest.raises(ValueError, match="batch_size=1438, expected from 1 to 1437"):
        data.batches(data.load("digits", seed=0).train, 1438)
