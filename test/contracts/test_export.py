"""Checkpoint to bundle: the same numbers as torch, nothing that the robot does not run, and clear refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support import ROOT
from support.bundles import demo_observation
from support.checkpoints import write_checkpoint
from support.exported import NOTES, Made, skip_tracing
from support.vocabularies import demo_tokenizer

from ki_vla_ros.bundle.folder import EXPERT, MODEL_CARD, PREFILL, TOKENIZER, Bundle, load_bundle
from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.bundle.onnx_header import read_header
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from training.export.__main__ import main
from training.export.bundle import TOLERANCE, ExportError, check_left_behind, export_bundle
from training.export.graphs import arrange
from training.export.parity import parity_error
from training.weights.checkpoints import POLICY, load_checkpoint


@pytest.fixture
def exported(made: Made) -> tuple[Path, Bundle]:
    return made.checkpoint, made.bundle


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "text")


def test_the_bundle_computes_what_torch_computes(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    model = load_checkpoint(checkpoint).eval()
    assert parity_error(model, bundle, cases=3) <= TOLERANCE
    policy = Policy(bundle, OnnxEngine(bundle))
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), "touch the red cube")
    arrays = (given.images_VCHW, given.image_mask_V, given.tokens_L, given.token_mask_L)
    with torch.no_grad():
        cache = model.prefill(*(torch.from_numpy(array)[None] for array in arrays))
        state = None if given.state_S is None else torch.from_numpy(given.state_S)[None]
        expected = model.sample_actions(cache, torch.from_numpy(policy.noise(7))[None], 10, state)[0].numpy()
    got = policy.denoise(policy.prefill(given), policy.noise(7), given.state_S)
    assert got == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    "part", ["vision.position.weight", "backbone.layers.1.attention.v.weight", "expert.layers.0.norm1.dense.weight"]
)
def test_parity_sees_a_small_difference_in_any_part(exported: tuple[Path, Bundle], part: str) -> None:
    checkpoint, bundle = exported
    model = load_checkpoint(checkpoint).eval()
    with torch.no_grad():
        model.get_parameter(part).mul_(1.1)
        assert parity_error(model, bundle, cases=1) > TOLERANCE
        model.get_parameter(part)[0] = math.nan
        assert not parity_error(model, bundle, cases=1) <= TOLERANCE


def test_the_graphs_hold_no_answers_and_no_dead_weights(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    model = load_checkpoint(checkpoint)
    rows = bundle.manifest.graph.vocab_size
    assert rows == bundle.tokenizer.get_vocab_size() < model.config.vocab_size
    assert bundle.tokenizer.token_to_id("<fast_0>") is None and bundle.tokenizer.token_to_id("<loc_0>") is None
    weights = {name: read_header(bundle.path / name).weights for name in (PREFILL, EXPERT)}
    tables = [dims for dims in weights[PREFILL].values() if rows in dims]
    assert tables == [(rows, model.config.backbone.width)], "one token table, and no head besides it"
    for dims in (*weights[PREFILL].values(), *weights[EXPERT].values()):
        assert model.config.vocab_size not in dims
    # Only the first backbone layer has its MLP on board (gate and up, down); the last has keys and values alone.
    assert sum(dims in {(32, 96), (96, 32), (48, 32), (32, 48)} for dims in weights[PREFILL].values()) == 2


def test_every_large_initialiser_is_a_weight_of_prefix_or_expert(exported: tuple[Path, Bundle]) -> None:
    """Listed one by one: no FAST, language or vision head among them, and no layer that only the time goes through."""
    checkpoint, bundle = exported
    model = load_checkpoint(checkpoint)
    heads = ("backbone.norm", "time_in", "time_out", "dense.weight", "dense.bias")
    for graph, name in zip(arrange(model, bundle.manifest.graph.vocab_size), (PREFILL, EXPERT), strict=True):
        ours = {key: tensor.detach().numpy() for key, tensor in graph.state_dict().items()}
        assert not [key for key in ours if any(head in key for head in heads)]
        known = {part.tobytes() for array in ours.values() for part in (array, array.T)}
        initialisers = onnx.load(str(bundle.path / name)).graph.initializer
        large = {weight.name: onnx.numpy_helper.to_array(weight) for weight in initialisers}
        large = {key: array for key, array in large.items() if array.size > 100 and array.dtype != bool}
        assert len(large) >= 10 and [key for key, array in large.items() if array.tobytes() not in known] == []


def test_too_many_weights_are_refused(exported: tuple[Path, Bundle], tmp_path: Path) -> None:
    checkpoint, bundle = exported
    model, rows = load_checkpoint(checkpoint), bundle.manifest.graph.vocab_size
    check_left_behind(model, rows, bundle.path)
    graph = onnx.load(str(bundle.path / EXPERT))
    head = onnx.numpy_helper.from_array(torch.zeros(model.config.vocab_size, 24).numpy(), "head")
    graph.graph.initializer.append(head)
    shutil.copy(bundle.path / PREFILL, tmp_path)
    onnx.save(graph, str(tmp_path / EXPERT))
    with pytest.raises(ExportError, match=r"expert\.onnx: expected at most \d+ weights"):
        check_left_behind(model, rows, tmp_path)
    with pytest.raises(ExportError, match=r"prefill\.onnx: expected at most \d+ weights"):
        check_left_behind(model, rows - 200, bundle.path)


def test_the_files_say_nothing_about_the_trainers_machine(exported: tuple[Path, Bundle]) -> None:
    _, bundle = exported
    for name in (PREFILL, EXPERT):
        content = (bundle.path / name).read_bytes()
        for trace in (b".py", b"stack_trace", b"site-packages", str(ROOT).encode()):
            assert trace not in content


def test_manifest_and_model_card_carry_the_policy(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    policy = PolicySpec.model_validate_json((checkpoint / POLICY).read_text())
    assert load_bundle(bundle.path).manifest == bundle.manifest
    assert all(getattr(bundle.manifest, name) == value for name, value in policy)
    graph = bundle.manifest.graph
    assert (graph.layers, graph.kv_heads, graph.head_dim, graph.image_tokens) == (2, 1, 16, 4)
    card = (bundle.path / MODEL_CARD).read_text()
    for expected in (NOTES, "| follow_rate | 0.93 |", "| gripper | joint_position | m |", "purple", "seed 0"):
        assert expected in card


def test_an_earlier_bundle_is_replaced_only_once_the_new_one_is_whole(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = made.checkpoint, Path(shutil.copytree(made.bundle.path, tmp_path / "bundle"))
    (out / MODEL_CARD).write_text("an earlier one")
    skip_tracing(monkeypatch, made)
    monkeypatch.setattr("training.export.bundle.parity_error", lambda model, bundle: math.nan)
    with pytest.raises(ExportError, match=r"parity: expected the graphs within 0\.0001 of torch, got nan"):
        export_bundle(checkpoint, out)
    assert (out / MODEL_CARD).read_text() == "an earlier one"
    monkeypatch.setattr("training.export.bundle.parity_error", lambda model, bundle: 0.0)
    again = export_bundle(checkpoint, out)
    assert again.path == out and load_bundle(out).manifest == again.manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"], "no scratch files are left"


def test_a_folder_of_something_else_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigurationError, match="expected an empty place or an earlier bundle"):
        export_bundle(checkpoint, tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "dear"


def resize_images(fields: dict[str, Any]) -> None:
    fields["image"]["size"] = 96


def shorten_horizon(fields: dict[str, Any]) -> None:
    fields["robot"]["horizon"] = 8


def feed_state_as_token(fields: dict[str, Any]) -> None:
    fields["state"]["encoding"] = "token"
    fields["prompt"]["template"] = "Task: {task}"


def drop_gripper(fields: dict[str, Any]) -> None:
    for part in ("state", "actions"):
        fields["robot"][part].pop()
    for stats in ("state", "action"):
        fields[stats]["low"].pop()
        fields[stats]["high"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize_images, r"policy\.json: image\.size: expected 24, as the checkpoint has it, got 96"),
        (shorten_horizon, r"horizon: expected 16, as the checkpoint has it, got 8"),
        (drop_gripper, r"actions \(or pad_to\): expected 7, as the checkpoint has it, got 6"),
        (feed_state_as_token, r"width of the state token: expected None, as the checkpoint has it, got 7"),
        (
            lambda fields: fields["robot"].update(horizon=0),
            r"policy\.json: robot\.horizon: expected >= 2, got 0",
        ),
    ],
)
def test_a_policy_of_another_model_is_refused(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    fields = json.loads((checkpoint / POLICY).read_text())
    change(fields)
    (checkpoint / POLICY).write_text(json.dumps(fields))
    with pytest.raises(ConfigurationError, match=message):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    demo_tokenizer(fast_vocab=17).save(str(checkpoint / TOKENIZER))
    with pytest.raises(ConfigurationError, match=r"tokens in tokenizer\.json: expected \d+, as the checkpoint has it"):
        export_bundle(checkpoint, tmp_path / "bundle")


def test_the_command_ends_with_one_message(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / POLICY).unlink()
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export: ") and "expected the policy's description beside the weights" in error
    assert error.count("\n") == 1
    missing = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), "--notes", str(tmp_path / "none.md")]
    assert main(missing) == 2
    assert "none.md" in capsys.readouterr().err


def test_the_command_tells_a_wrong_export_from_one_that_could_not_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.export.bundle.write_graphs", lambda graphs, folder: None)
    monkeypatch.setattr("training.export.bundle.check_left_behind", fail_to_match)
    assert main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")]) == 1


def fail_to_match(*given: object) -> None:
    raise ExportError("the graphs are another model's")


def test_cutting_the_table_leaves_the_model_alone(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefill, expert = arrange(model, 50)
    cut = prefill.model
    assert torch.equal(cut.backbone.embedding.weight, before["backbone.embedding.weight"][:50])
    assert cut.vision.position.weight is model.vision.position.weight, "shared: a large model would not fit twice"
    assert expert.model.action_in.weight is model.action_in.weight
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
