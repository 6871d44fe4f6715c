"""A valid bundle loads; each damaged one is refused with a message that names its fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from pydantic import ValidationError
from support.bundles import HORIZON, demo_policy, state_token_policy, write_test_bundle

from ki_vla_ros.bundle.folder import (
    EXPERT,
    MANIFEST,
    MODEL_CARD,
    PREFILL,
    TIME,
    TOKENIZER,
    file_sha256,
    graph_interface,
    load_bundle,
)
from ki_vla_ros.bundle.manifest import Manifest
from ki_vla_ros.bundle.onnx_header import TensorType, read_header
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import BundleError


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_bundle(tmp_path_factory.mktemp("bundles") / "valid").path


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "bundle"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def rehash(folder: Path) -> None:
    """Make the manifest list what is there, so that only the fault under test remains."""
    names = [entry.name for entry in folder.iterdir() if entry.name != MANIFEST]
    edit_manifest(folder, lambda m: m.update(files={name: file_sha256(folder / name) for name in names}))


def edit_graph(folder: Path, name: str, change: Callable[[onnx.GraphProto], object]) -> None:
    model = onnx.load(str(folder / name))
    change(model.graph)
    onnx.save(model, str(folder / name))
    rehash(folder)


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / TOKENIZER).read_text())
    change(content)
    (folder / TOKENIZER).write_text(json.dumps(content))
    rehash(folder)


def set_shape(value: onnx.ValueInfoProto, axis: int, size: int) -> None:
    value.type.tensor_type.shape.dim[axis].dim_value = size


def refer_outside(graph: onnx.GraphProto) -> None:
    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")


def hide_reference_in_a_branch(graph: onnx.GraphProto) -> None:
    inner = helper.make_tensor("inner", onnx.TensorProto.FLOAT, [1], [0.0])
    inner.ClearField("float_data")
    inner.data_location = onnx.TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="/etc/hostname")
    branch = helper.make_graph([], "branch", [], [], [inner])
    graph.node.append(helper.make_node("If", ["clean"], ["ignored"], then_branch=branch, else_branch=branch))


def add_file(folder: Path, name: str, listed: bool) -> None:
    (folder / name).write_bytes(b"import os")
    if listed:
        rehash(folder)


def link_outside(folder: Path) -> None:
    target = folder.parent / "elsewhere.md"
    shutil.move(folder / MODEL_CARD, target)
    (folder / MODEL_CARD).symlink_to(target)


def drop_word(folder: Path, word: str) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["model"]["vocab"][word]
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != word]

    edit_tokenizer(folder, change)


def put(*path: str | int, value: Any) -> Callable[[Path], None]:
    """A fault: one value of the manifest replaced."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return lambda folder: edit_manifest(folder, change)


def in_format_2(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """A fault in a manifest of format 2."""

    def rewrite(content: Any) -> None:
        robot = content.pop("robot")
        joint = ("name", "unit", "lower", "upper", "max_velocity", "relative")
        content["joints"] = [{name: action[name] for name in joint} for action in robot["actions"]]
        content["cameras"] = [{"name": camera["name"]} for camera in robot["cameras"]]
        content |= {"horizon": robot["horizon"], "action_period_s": robot["action_period_s"], "format_version": 2}
        change(content)

    return lambda folder: edit_manifest(folder, rewrite)


def drop(*path: str | int) -> Callable[[Path], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return lambda folder: edit_manifest(folder, change)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), r"expected a folder, got .*, which is missing"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), r"expected a folder, got .*, which is a file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), r"expected manifest.json in a bundle, got none"),
    "manifest no JSON": (lambda f: (f / MANIFEST).write_text("{"), r"manifest.json: expected JSON"),
    "manifest no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest.json: expected JSON"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), r"expected a JSON object, got list"),
    "older format": (put("format_version", value=1), r"expected format_version 2 or 3, got 1"),
    "no format": (drop("format_version"), r"expected format_version 2 or 3, got None"),
    "unknown key": (put("colour", value="red"), r"colour: expected another key, got .red. for colour: no such key"),
    "missing key": (drop("robot", "horizon"), r"robot.horizon: expected horizon, got none"),
    "no robot": (drop("robot"), r"robot: expected robot, got none"),
    "robot in format 2": (put("format_version", value=2), r"robot: expected none in format 2"),
    "wrong type": (put("robot", "horizon", value="many"), r"robot.horizon: .*integer.*got 'many'"),
    "infinite limit": (
        put("robot", "actions", 2, "upper", value=float("inf")),
        r"'elbow': lower and upper: expected both",
    ),
    "infinite limit in format 2": (
        in_format_2(lambda m: m["joints"][2].update(upper=float("inf"))),
        r"joints.2.upper: .*finite",
    ),
    "not a number": (put("action", "low", 3, value=float("nan")), r"action.low.3: .*finite"),
    "limits swapped": (
        put("robot", "actions", 1, "lower", value=9.0),
        r"'shoulder_lift': expected lower < upper, got 9.0",
    ),
    "still joint": (
        put("robot", "actions", 0, "max_velocity", value=0),
        r"actions.0.max_velocity: expected > 0, got 0",
    ),
    "two joints of one name": (
        put("robot", "actions", 1, "name", value="shoulder_pan"),
        r"actions: .shoulder_pan.: expected distinct names",
    ),
    "two cameras of one name": (
        put("robot", "cameras", 1, "name", value="scene"),
        r"cameras: .scene.: expected distinct",
    ),
    "no camera": (put("robot", "cameras", value=[]), r"cameras: .*at least 1"),
    "only optional cameras": (
        lambda f: edit_manifest(f, lambda m: [c.update(optional=True) for c in m["robot"]["cameras"]]),
        r"cameras: expected at least one required camera",
    ),
    "statistics swapped": (
        in_format_2(lambda m: m["state"]["low"].__setitem__(0, 4.0)),
        r"state: dimension 0: expected low < high",
    ),
    "statistics of no width": (put("state", "low", 0, value=3.1), r"state: dimension 0: expected two values, got 3.1"),
    "statistics uneven": (
        put("action", "high", value=[1.0]),
        r"action: expected low and high of equal length, got 7 and 1",
    ),
    "statistics of six": (
        put("action", value={"low": [-1.0] * 6, "high": [1.0] * 6}),
        r"action: expected 7 values \(one per dimension\), got 6",
    ),
    "delay too long": (put("max_prefix_delay", value=HORIZON), r"max_prefix_delay: expected less than the horizon 16"),
    "stretched images": (put("image", "resize", value="stretch"), r"image.resize: .*'pad'.*got 'stretch'"),
    "other flow": (put("flow", "convention", value="noise_at_zero"), r"flow.convention: .*'noise_at_one'"),
    "prompt without task": (put("prompt", "template", value="State: {state}"), r"expected \{task\} exactly once"),
    "prompt without state": (put("prompt", "template", value="Task: {task}"), r"expected \{state\} 1 times"),
    "prompt with state besides token": (put("state", "encoding", value="token"), r"expected \{state\} 0 times"),
    "prefix length": (put("graph", "prefix_length", value=41), r"graph.prefix_length: expected 40 .*got 41"),
    "state dim": (
        put("graph", "state_dim", value=7),
        r"graph.state_dim: expected None \(the state is in the prompt\), got 7",
    ),
    "too narrow": (put("pad_to", value=3), r"pad_to: expected at least 7 \(the dimensions\), got 3"),
    "modulation": (
        put("graph", "modulation", value=2),
        r"expert.onnx: input 'modulation': expected float32 \[2\], got",
    ),
    "action dim": (
        put("graph", "action_dim", value=32),
        r"graph.action_dim: expected 7 \(one per dimension, or pad_to\), got 32",
    ),
    "file lost": (lambda f: (f / EXPERT).unlink(), r"expected file expert.onnx, .*got none"),
    "file changed": (
        lambda f: (f / MODEL_CARD).write_text("better"),
        r"README.md: expected sha256 [0-9a-f]{12}..., got [0-9a-f]{12}",
    ),
    "file cut off": (
        lambda f: (f / PREFILL).write_bytes((f / PREFILL).read_bytes()[:-100]),
        r"prefill.onnx: expected sha256",
    ),
    "graph not listed": (drop("files", EXPERT), r"files: expected expert.onnx among them"),
    "no hash": (put("files", EXPERT, value="abc"), r"files.expert.onnx: .*pattern"),
    "path outside": (put("files", "../secret", value="0" * 64), r"expected plain names of files .*'\.\./secret'"),
    "absolute path": (put("files", "/etc/hostname", value="0" * 64), r"expected plain names .*'/etc/hostname'"),
    "parent folder": (put("files", "..", value="0" * 64), "expected plain names of files .*got '..'"),
    "link outside": (link_outside, r"README.md: expected a file inside the bundle, got a link to .*elsewhere.md"),
    "pickle beside": (lambda f: add_file(f, "extra.pkl", listed=False), r"got 'extra.pkl' beside them; remove it"),
    "folder beside": (lambda f: (f / "__pycache__").mkdir(), r"got '__pycache__' beside them"),
    "code listed": (lambda f: add_file(f, "model.py", listed=True), r"got 'model.py', which no graph refers to"),
    "graph no ONNX": (
        lambda f: ((f / EXPERT).write_bytes(b"PK\x03\x04" * 50), rehash(f)),
        r"expert.onnx: expected an ONNX model, got other bytes",
    ),
    "graph empty": (lambda f: ((f / EXPERT).write_bytes(b""), rehash(f)), r"expert.onnx: expected an ONNX model"),
    "graph cut off and hashed": (
        lambda f: ((f / PREFILL).write_bytes((f / PREFILL).read_bytes()[:-100]), rehash(f)),
        r"prefill.onnx: expected an ONNX model, .*middle of a field",
    ),
    "weights outside": (
        lambda f: edit_graph_unchecked(f, PREFILL, refer_outside),
        r"prefill.onnx: expected weights in files that the manifest lists, got '\.\./secret.bin'",
    ),
    "weights outside, in a branch": (
        lambda f: edit_graph_unchecked(f, EXPERT, hide_reference_in_a_branch),
        r"expert.onnx: expected an ONNX model, .*field 6 in Attribute, which no graph of a policy has: no functions",
    ),
    "own operator": (
        lambda f: edit_graph(f, EXPERT, lambda g: setattr(g.node[0], "domain", "my.ops")),
        r"expert.onnx: expected standard ONNX operators only, got domain my.ops",
    ),
    "input renamed": (
        lambda f: edit_graph(f, EXPERT, lambda g: setattr(g.input[0], "name", "cache")),
        r"expert.onnx: expected inputs \['clean', 'keys', .*got \['cache'",
    ),
    "output missing": (
        lambda f: edit_graph(f, PREFILL, lambda g: g.output.pop()),
        r"prefill.onnx: expected outputs \['keys', 'prefix_mask', 'values'\], got \['keys', 'values'\]",
    ),
    "language head exported": (
        lambda f: edit_graph(f, PREFILL, lambda g: g.output.append(helper.make_tensor_value_info("logits", 1, [1, 9]))),
        r"prefill.onnx: expected outputs .*got .*'logits'",
    ),
    "wrong shape": (
        lambda f: edit_graph(f, PREFILL, lambda g: set_shape(g.input[0], 3, 64)),
        r"prefill.onnx: input 'images': expected float32 \[2, 3, 96, 96\], got float32 \[2, 3, 96, 64\]",
    ),
    "free batch": (
        lambda f: edit_graph(f, EXPERT, lambda g: setattr(g.output[0].type.tensor_type.shape.dim[0], "dim_param", "H")),
        r"expert.onnx: output 'velocity': expected float32 \[16, 7\], got float32 \[H, 7\]",
    ),
    "wrong type of tokens": (
        lambda f: edit_graph(f, PREFILL, lambda g: setattr(g.input[2].type.tensor_type, "elem_type", 6)),
        r"prefill.onnx: input 'tokens': expected int64 \[32\], got int32 \[32\]",
    ),
    "horizon of another model": (
        put("robot", "horizon", value=20),
        r"input 'x_t': expected float32 \[20, 7\], got .*\[16, 7\]",
    ),
    "image size of another model": (put("image", "size", value=64), r"'images': expected .*64, 64\], got .*96, 96\]"),
    "tokenizer no tokenizer": (
        lambda f: ((f / TOKENIZER).write_text("{}"), rehash(f)),
        r"tokenizer.json: expected a tokenizers file",
    ),
    "tokenizer without padding token": (lambda f: drop_word(f, "<pad>"), r"expected the token <pad>"),
    "tokenizer without readout token": (
        lambda f: drop_word(f, "<act_query_2>"),
        r"expected the token <act_query_2> in the vocabulary",
    ),
    "tokenizer without a word of the frame": (lambda f: drop_word(f, "State"), r"got no 'State' in the vocabulary"),
    "tokenizer without a state bin": (lambda f: drop_word(f, "137"), r"token for each state bin .*none for '137'"),
    "tokenizer that cuts off": (
        lambda f: edit_tokenizer(
            f,
            lambda t: t.update(
                truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
            ),
        ),
        r"expected neither truncation nor padding, got .*8",
    ),
    "ids beyond the table": (put("graph", "vocab_size", value=100), r"expected ids below 100 .*for '255'"),
    "prompt too short": (
        lambda f: edit_manifest(f, lambda m: (m["prompt"].update(length=20), m["graph"].update(prefix_length=28))),
        r"'tokens': expected int64 \[20\]",
    ),
}


def edit_graph_unchecked(folder: Path, name: str, change: Callable[[onnx.GraphProto], object]) -> None:
    """Like `edit_graph`, for references that onnx itself would not write."""
    model = onnx.load(str(folder / name))
    change(model.graph)
    (folder / name).write_bytes(model.SerializeToString())
    rehash(folder)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_bundle_is_refused_with_its_fault(folder: Path, fault: str) -> None:
    breaking, message = BROKEN[fault]
    breaking(folder)
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(folder)
    assert len(str(caught.value)) < 700, "one clear message"


def test_a_prompt_without_room_for_an_instruction_is_refused(tmp_path: Path) -> None:
    short = demo_policy(prompt={"template": demo_policy().prompt.template, "length": 21})
    with pytest.raises(BundleError, match=r"expected room for an instruction in prompt\.length 21, .* needs 22 tokens"):
        write_test_bundle(tmp_path / "short", short)


@pytest.mark.parametrize("policy", [demo_policy(), state_token_policy()], ids=["text", "token"])
def test_a_valid_bundle_loads(tmp_path: Path, policy: Any) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", policy)
    again = load_bundle(str(tmp_path / "bundle"))
    assert again.manifest == bundle.manifest
    assert again.manifest.axis_names[0] == "shoulder_pan" and again.manifest.action_period_ns == 50_000_000
    assert set(again.manifest.files) == {PREFILL, EXPERT, TIME, TOKENIZER, MODEL_CARD}
    for field, value in policy:
        assert getattr(again.manifest, field) == value


def test_a_bundle_of_links_into_one_folder_loads(valid: Path, tmp_path: Path) -> None:
    """As colcon build --symlink-install lays share files out."""
    for file in valid.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert load_bundle(tmp_path).path == valid


def cached(bundle: Path, cache: Path) -> Path:
    """The bundle as Hugging Face's cache has it: links with its names into a folder of blobs; returns the links'."""
    snapshot, blobs = cache / "snapshots" / "0a1b", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "another revision's").write_text("")
    for file in bundle.iterdir():
        digest = file_sha256(file)
        shutil.copy(file, blobs / digest)
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    (snapshot / ".gitattributes").write_text("*.onnx filter=lfs\n")
    (snapshot / ".cache" / "huggingface").mkdir(parents=True)
    return snapshot


def test_a_bundle_in_a_hugging_face_cache_loads_and_runs(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(folder / PREFILL))
    onnx.save(model, str(folder / PREFILL), save_as_external_data=True, location="prefill.data", size_threshold=4096)
    rehash(folder)
    snapshot = cached(folder, tmp_path / "models--me--arm")
    bundle = load_bundle(snapshot)
    assert bundle.path == snapshot and "prefill.data" in bundle.manifest.files
    OnnxEngine(bundle).close()
    (tmp_path / "by another link").symlink_to(snapshot)
    assert load_bundle(tmp_path / "by another link").path == snapshot


@pytest.mark.parametrize("name", [PREFILL, MODEL_CARD])
def test_a_link_out_of_a_hugging_face_cache_is_refused(valid: Path, tmp_path: Path, name: str) -> None:
    snapshot = cached(valid, tmp_path / "models--me--arm")
    content, blob = (snapshot / name).read_bytes(), (snapshot / name).resolve()
    for target in (tmp_path / "elsewhere", snapshot / "real", blob.parent / "deeper" / "blob"):
        (snapshot / name).unlink()
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)  # the right content does not help
        (snapshot / name).symlink_to(target)
        with pytest.raises(BundleError, match=rf"{name}: expected a file inside the bundle, in .*blobs, got a link to"):
            load_bundle(snapshot)
        target.unlink()
    blob.unlink()
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(blob)
    with pytest.raises(BundleError, match=rf"expected file {name}, .* got a link to .*, where there is none; copy or"):
        load_bundle(snapshot)


def test_weights_beside_the_graph_are_listed_and_loaded(folder: Path) -> None:
    model = onnx.load(str(folder / PREFILL))
    onnx.save(model, str(folder / PREFILL), save_as_external_data=True, location="prefill.data", size_threshold=0)
    with pytest.raises(BundleError, match="sha256"):
        load_bundle(folder)
    rehash(folder)
    assert "prefill.data" in load_bundle(folder).manifest.files


def test_the_manifest_is_frozen(valid: Path) -> None:
    manifest = load_bundle(valid).manifest
    with pytest.raises(ValidationError, match="frozen"):
        manifest.horizon = 3  # type: ignore[misc]
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_headers_say_what_onnx_says(valid: Path) -> None:
    for name in (PREFILL, EXPERT):
        header, graph = read_header(valid / name), onnx.load(str(valid / name)).graph
        for values, got in ((graph.input, header.inputs), (graph.output, header.outputs)):
            assert list(got) == [value.name for value in values]
            for value in values:
                tensor = value.type.tensor_type
                dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
                assert got[value.name] == TensorType(dtype, tuple(d.dim_value for d in tensor.shape.dim))
        assert header.weights == {t.name: numpy_helper.to_array(t).shape for t in graph.initializer}
        assert not header.external_files and not header.foreign_domains
    manifest = load_bundle(valid).manifest
    assert graph_interface(manifest)[EXPERT][0] == read_header(valid / EXPERT).inputs


@given(data=st.data())
def test_damaged_bytes_never_crash_the_reader(valid: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    good = (valid / EXPERT).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=8))
    keep = data.draw(st.booleans())
    damaged = tmp_path_factory.mktemp("damaged") / EXPERT
    damaged.write_bytes(good[:at] + junk + (good[at + len(junk) :] if keep else b""))
    try:
        read_header(damaged)
    except BundleError as error:
        assert "expected an ONNX model" in str(error)
