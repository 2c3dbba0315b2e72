"""Profiles as JSON and in the text form of the original PipeDream."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax.errors import PdjaxWarning
from pdjax.profile.files import load_profile
from pdjax.profile.graph_txt import read_graph, write_graph
from pdjax.profile.profile import LayerProfile, Profile


def node(name: str, what: str, forward: str, backward: str, activation: str, params: str) -> str:
    times = f"forward_compute_time={forward}, backward_compute_time={backward}"
    return f"{name} -- {what} -- {times}, activation_size={activation}, parameter_size={params}\n"


DIAMOND = (
    node("node1", "Input", "9.000", "0.000", "8.0", "0.000")
    + node("node2", "Conv2d(3, 64)", "1.500", "3.000", "[100.0; 28.0]", "1728.000")
    + node("node3", "ReLU", "0.5", "0.25", "64.0", "0.0")
    + node("node4", "Add", "0.25", "0.25", "32.0", "0.0")
    + "\tnode1 -- node2\n\tnode2 -- node3\n\tnode2 -- node4\n\tnode3 -- node4\n"
)


def test_a_graph_becomes_a_line_with_every_crossing_value_counted_once():
    profile = read_graph(DIAMOND)
    assert [layer.name.split()[0] for layer in profile.layers] == [
        "node1",
        "node2",
        "node3",
        "node4",
    ]
    assert [layer.cut_bytes for layer in profile.layers] == [0, 128, 128 + 64, 0]
    assert profile.layers[0].forward_s == 0  # an input: loading data is no pass of the model
    assert profile.layers[1].forward_s == 1.5e-3
    assert profile.layers[1].backward_s == 3e-3
    assert profile.layers[1].param_bytes == 1728


def test_the_line_follows_a_branch_to_its_end():
    """Two branches of three nodes: side by side they would keep two values alive in each cut."""
    sizes = {"in": 1, "a1": 9, "b1": 9, "a2": 9, "b2": 9, "a3": 1, "b3": 1, "out": 1}
    edges = "in-a1 in-b1 a1-a2 b1-b2 a2-a3 b2-b3 a3-out b3-out".split()
    text = "".join(node(name, "x", "1", "1", str(size), "0") for name, size in sizes.items())
    text += "".join(f"\t{' -- '.join(edge.split('-'))}\n" for edge in edges)
    names = [layer.name[:2] for layer in read_graph(text).layers]
    runs = [branch for branch, _ in itertools.groupby(name[0] for name in names)]
    assert runs in (["i", "a", "b", "o"], ["i", "b", "a", "o"])


numbers = st.floats(0, 1e12, allow_nan=False)
profiles = st.lists(
    st.builds(
        LayerProfile,
        name=st.sampled_from(["dense", "conv/inner", "block_0"]),
        forward_s=numbers,
        backward_s=numbers,
        cut_bytes=numbers,
        param_bytes=numbers,
        stash_bytes=numbers,
    ),
    min_size=1,
    max_size=5,
).map(lambda layers: Profile(tuple(layers), batch_size=8, device="cpu", source="measured"))


@given(profiles)
def test_json_reads_back(profile):
    assert Profile.from_json(profile.to_json()) == profile


@given(profiles)
def test_the_text_form_reads_back(profile):
    again = read_graph(write_graph(profile))
    assert again.column("forward_s") == pytest.approx(profile.column("forward_s"))
    assert again.column("param_bytes") == profile.column("param_bytes")
    assert again.column("cut_bytes")[:-1] == profile.column("cut_bytes")[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("forward_compute_time=1.500", "forward_compute_time=-1"), "line 2: forward_compute_time"),
        (
            ("forward_compute_time=1.500", "forward_compute_time=nan"),
            "line 2: forward_compute_time",
        ),
        (
            ("forward_compute_time=1.500", "forward_compute_time=soon"),
            "line 2: .*expected a number",
        ),
        ((", parameter_size=1728.000", ""), "line 2: no parameter_size"),
        (("node2 -- Conv2d(3, 64) -- ", "node2 "), "line 2: expected 'node -- description"),
        (("node2 -- Conv", "node1 -- Conv"), "line 2: node 'node1' is there twice"),
        (("\tnode3 -- node4", "\tnode3 -- node5"), "line 8: an edge names 'node5'"),
        (("\tnode3 -- node4", "\tnode3"), "line 8: expected an edge"),
        (("\tnode1 -- node2", "\tnode4 -- node2"), "form a cycle among node2, node3, node4"),
    ],
)
def test_what_is_no_graph(change, message):
    with pytest.raises(ValueError, match=rf"(?s)model.txt.*{message}"):
        read_graph(DIAMOND.replace(*change), "model.txt")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_graph(text):
    with pytest.raises(ValueError, match="no nodes"):
        read_graph(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "p.json, line 1"),
        ("[]", "no profile"),
        ('{"layers": {}, "format": 1}', "no profile"),
        ('{"layers": [], "format": 7}', "expected format 1"),
        ('{"layers": [], "format": 1}', "no layers"),
        ('{"layers": [{"name": "a"}], "format": 1}', "layer 1: missing forward_s, backward_s"),
        ('{"layers": [3], "format": 1}', "layer 1: 3; expected the fields"),
    ],
)
def test_what_is_no_profile(text, message):
    with pytest.raises(ValueError, match=message):
        Profile.from_json(text, "p.json")


def test_a_layer_that_takes_negative_time():
    with pytest.raises(ValueError, match="layer 'a': forward_s is -1"):
        LayerProfile("a", -1.0, 0.0, 0.0, 0.0)


PROFILE = Profile(
    (LayerProfile("a", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), LayerProfile("b", 0.0, 0.0, 0.0, 0.0)),
    batch_size=8,
    device="cpu",
    model="00ff",
    jax_version="0.10.2",
    source="measured",
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("forward_s", 1.0, "NaN"), "layer 'a': forward_s is nan; expected a finite number"),
        (("backward_s", 2.0, "-2.0"), "layer 'a': backward_s is -2.0"),
        (("cut_bytes", 3.0, '"3"'), "layer 'a': cut_bytes is '3'"),
        (("flops", 6.0, "null"), "layer 'a': flops is None"),
        (("batch_size", 8, "0"), "batch_size is 0; expected a whole number of at least 1"),
        (("batch_size", 8, "2.5"), "batch_size is 2.5"),
        (("device", '"cpu"', "3"), "device is 3; expected a text"),
        (("source", '"measured"', '"guessed"'), "source is 'guessed'; expected one of measured"),
        (("device", '"cpu"', '"cpu", "colour": "red"'), "unknown colour; known are layers, batch"),
        (("forward_s", 1.0, '1.0, "sideways_s": 1.0'), "layer 1: unknown sideways_s"),
    ],
)
def test_a_bad_figure_in_a_file(change, message, tmp_path):
    name, old, new = change
    text = PROFILE.to_json()
    assert f'"{name}": {old}' in text
    path = tmp_path / "bad.json"
    path.write_text(text.replace(f'"{name}": {old}', f'"{name}": {new}', 1))
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        load_profile(path)


def test_files_of_both_forms_are_told_apart(tmp_path):
    saved, graph = tmp_path / "saved", tmp_path / "graph"
    PROFILE.save(saved)
    graph.write_text(DIAMOND)
    assert load_profile(saved) == PROFILE
    assert load_profile(str(graph)) == read_graph(DIAMOND)


def test_a_file_without_the_fields_that_came_later_is_read(tmp_path):
    value = json.loads(PROFILE.to_json())
    del value["dtype"], value["layers"][0]["spread_s"]
    (tmp_path / "old.json").write_text(json.dumps(value))
    layers = (dataclasses.replace(PROFILE.layers[0], spread_s=0.0), PROFILE.layers[1])
    expected = dataclasses.replace(PROFILE, layers=layers, dtype="")
    assert load_profile(tmp_path / "old.json") == expected


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the profile .*nowhere"):
        load_profile(tmp_path / "nowhere")
    (tmp_path / "model.txt").write_text("hello\n")
    with pytest.raises(ValueError, match=r"model\.txt, line 1"):
        load_profile(tmp_path / "model.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cannot read the profile .*picture\.png"):
        load_profile(tmp_path / "picture.png")


def test_another_batch_size_is_scaled_with_a_warning():
    with pytest.warns(PdjaxWarning, match=r"of 8 examples.*scaled by 2/8.*measured with 2"):
        scaled = PROFILE.rescaled(2)
    first = LayerProfile("a", 0.25, 0.5, 0.75, 4.0, 1.25, 1.5, 1.75)
    assert scaled == dataclasses.replace(PROFILE, layers=(first, PROFILE.layers[1]), batch_size=2)


def test_the_same_batch_size_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PROFILE.rescaled(8) is PROFILE


def test_a_batch_size_cannot_be_scaled_from_none():
    with pytest.raises(ValueError, match=r"does not say for which batch size.*batch_size=4"):
        dataclasses.replace(PROFILE, batch_size=None).rescaled(4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        PROFILE.rescaled(0)
