"""Text as bytes: the source of Python's standard library, or files of one's own.

The files of a corpus are laid end to end in one array, and an example is a window of it. Document
boundaries are ignored: a window may begin in one file and end in the next.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from pdjax.data.dataset import Dataset, Example, shuffle_for_ever

VOCAB_SIZE = 256
"""A token is a byte, so any file in any encoding can be read."""

HELD_OUT_FRACTION = 0.05
"""Share of the bytes that is held out for testing; at least one example's worth."""

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_TEST_ORDER_SEED = 0  # fixed, so that the order of the test examples is too
_MAX_NAMED_FILES = 5  # in an error message


@dataclass(frozen=True)
class _Corpus:
    """Bytes of all files in one array: ``bytes[:cut]`` is for training, the rest is held out."""

    bytes: np.ndarray
    cut: int


def load_stdlib(*, seed: int, sequence_length: int) -> Dataset:
    """Loads the source of the standard library of the Python that runs, about 30 MB.

    Whole files are held out, chosen by a hash of their path within the library: the split depends
    on the version of Python, and neither on the seed nor on where Python is installed.

    Args:
        seed: what the order of the training examples depends on.
        sequence_length: tokens of an example.

    Returns:
        The data set.

    Raises:
        ValueError: this Python comes without the source of its library, or a file of it cannot be
            read.
    """
    root = sysconfig.get_path("stdlib")
    paths = _python_files(root)
    if not paths:
        raise ValueError(
            f"found no .py file of the standard library in {root}, expected its source there: use "
            "another Python, or text files of your own as 'path/*.txt'"
        )
    return _load("stdlib", paths, seed, sequence_length)


def load_files(pattern: str, *, seed: int, sequence_length: int) -> Dataset:
    """Loads text files.

    Whole files are held out, chosen by a hash of their path below the directory that they have in
    common. Where no whole file fits into the share to hold out, the end of the corpus is held out,
    which of a single file is its end.

    Args:
        pattern: path of a file, or a glob, in which ``**`` stands for directories at any depth.
        seed: what the order of the training examples depends on.
        sequence_length: tokens of an example.

    Returns:
        The data set.

    Raises:
        ValueError: no file matches, a file cannot be read, or there is too little text for one
            example to train on and one to test with.
    """
    expanded = os.path.expanduser(pattern)
    matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
    paths = sorted({path for path in matches if not os.path.isdir(path)})
    if not paths:
        raise ValueError(
            f"no file matches {pattern!r}, expected the path of a text file or a glob such as "
            "'books/*.txt' or 'src/**/*.py' (a directory alone does not count)"
        )
    return _load(pattern, paths, seed, sequence_length)


def _load(name: str, paths: Sequence[str], seed: int, sequence_length: int) -> Dataset:
    """The data set of the text in ``paths``."""
    if sequence_length < 1:
        raise ValueError(f"got sequence_length={sequence_length}, expected at least 1 token")
    corpus = _read_corpus(paths, min_held_out=sequence_length + 1)
    train, test = corpus.bytes[: corpus.cut], corpus.bytes[corpus.cut :]
    return Dataset(
        name=name,
        kind="text",
        train=shuffle_for_ever(_windows(train, sequence_length), seed),
        test=_windows(test, sequence_length).shuffle(seed=_TEST_ORDER_SEED),
        num_classes=VOCAB_SIZE,
        description=(
            f"{len(corpus.bytes):,} bytes of text in {len(paths):,} files, "
            f"{len(test):,} bytes held out, {sequence_length} bytes an example"
        ),
        content=(train, test),
    )


def _windows(corpus: np.ndarray, length: int) -> grain.MapDataset[Example]:
    """Examples of ``length`` tokens, one after the other; the last target begins the next one."""

    def window(index: int) -> Example:
        start = index * length
        tokens = corpus[start : start + length + 1].astype(np.int32)
        return {"x": tokens[:-1], "y": tokens[1:]}

    return grain.MapDataset.range((len(corpus) - 1) // length).map(window)


def _python_files(root: str) -> list[str]:
    """Paths of the library's ``.py`` files below ``root``, without installed packages."""
    paths = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_THE_LIBRARY]
        paths += [os.path.join(directory, name) for name in names if name.endswith(".py")]
    return [path for path in paths if os.path.isfile(path)]


def _read_corpus(paths: Sequence[str], min_held_out: int) -> _Corpus:
    """Reads the files into one array, those to hold out last.

    Args:
        paths: the files.
        min_held_out: the fewest bytes that training and testing can do with, each.

    Returns:
        The corpus, in an order that depends on nothing but the files' relative paths and sizes.

    Raises:
        ValueError: a file cannot be read, or they hold fewer than twice ``min_held_out`` bytes.
    """
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = {path: Path(os.path.relpath(path, root)).as_posix() for path in paths}
    ordered = sorted(paths, key=lambda path: names[path])
    sizes = {path: _size(path) for path in ordered}
    _check_enough(sizes, min_held_out)
    held_out = _choose_held_out(names, sizes)
    corpus = bytearray()
    _append(corpus, (path for path in ordered if path not in held_out))
    cut = len(corpus)
    _append(corpus, (path for path in ordered if path in held_out))
    if min(cut, len(corpus) - cut) < min_held_out:
        cut = len(corpus) - max(min_held_out, int(HELD_OUT_FRACTION * len(corpus)))
    array = np.frombuffer(corpus, np.uint8)
    array.flags.writeable = False
    return _Corpus(array, cut)


def _choose_held_out(names: dict[str, str], sizes: dict[str, int]) -> set[str]:
    """Paths of whole files, taken in the order of their hash while they fit into the share."""
    room = HELD_OUT_FRACTION * sum(sizes.values())
    chosen = set()
    for path in sorted(names, key=lambda path: hashlib.sha256(names[path].encode()).digest()):
        room -= sizes[path]
        if room < 0:
            break
        chosen.add(path)
    return chosen


def _check_enough(sizes: dict[str, int], min_held_out: int) -> None:
    """Raises ``ValueError`` where the files are too short for two examples."""
    total = sum(sizes.values())
    if total < 2 * min_held_out:
        named = [f"{path} ({size} bytes)" for path, size in sizes.items()][:_MAX_NAMED_FILES]
        if len(sizes) > len(named):
            named.append(f"{len(sizes) - len(named)} more")
        raise ValueError(
            f"got {total} bytes of text in {', '.join(named)}, "
            f"expected at least {2 * min_held_out}: {min_held_out} (sequence_length + 1) for an "
            "example to train on and as many for one to test with; add text or lower "
            "sequence_length"
        )


def _size(path: str) -> int:
    """Size of a file in bytes."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _append(corpus: bytearray, paths: Iterable[str]) -> None:
    """Appends the contents of the files to ``corpus``."""
    for path in paths:
        try:
            corpus += Path(path).read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ValueError:
    """The error to raise where a file cannot be read."""
    return ValueError(
        f"cannot read {path}: {error.strerror}; expected a readable file: check its permissions, "
        "or leave it out of the pattern"
    )
