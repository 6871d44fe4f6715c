"""The recipe end to end at a tiny size: stages, insulation, resuming, gates, data, and a bundle at the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.recipes import tiny_run

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.sim.task import HELD_OUT
from training import train
from training.config import StageConfig, TrainingConfig, load_config
from training.data.simulated.generate import BACKGROUND, MAX_OBJECTS, load_arrays, make_data
from training.data.simulated.questions import COMBINATIONS
from training.evaluate.__main__ import main as evaluate_main
from training.evaluate.executors import main as compare_main
from training.evaluate.offline import measure
from training.export.__main__ import main as export_main
from training.losses import losses
from training.losses.losses import draw_flow_time
from training.train import Trainer, chunk_timing, last_token, take_rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data folder is shared by the module, simulated once."""
    return tiny_run(tmp_path_factory.mktemp("training"), steps=2)


def configure(settings: dict[str, Any], **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        settings | {key: str(v) if isinstance(v, Path) else v for key, v in changes.items()}
    )


def weights(trainer: Trainer, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items() if name.startswith(prefix)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_whole_run_ends_in_a_bundle_that_drives_the_arm(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(configure(settings, out=tmp_path / "run"))
    trainer.run()
    export_main(["--checkpoint", str(tmp_path / "run" / "policy"), "--out", str(tmp_path / "bundle"), "--torch"])
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.provenance.data_fingerprint == trainer.meta["fingerprint"]
    assert bundle.manifest.max_prefix_delay == 3
    assert [camera.name for camera in bundle.manifest.cameras] == ["wrist", "scene"]
    capsys.readouterr()
    evaluate_main([str(tmp_path / "bundle"), "--episodes", "1", "--flow-steps", "2"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["episodes"] == 1 and 0.2 <= figures["chance_follow_rate"] <= 1 / 3
    assert figures["seam_step"] < 1e-6
    pullback, calls = TorchEngine.pullback, []
    monkeypatch.setattr(TorchEngine, "pullback", lambda *given: calls.append(1) or pullback(*given))
    wanted = ["executor=rtc", "engine=torch", "guidance_jacobian=exact"]
    wanted += [f"limits.{rule}=clamp" for rule in ("on_jump", "on_speed", "on_position")]  # it has learned nothing yet
    true_form = [part for pair in wanted for part in ("--set", pair)]
    evaluate_main([str(tmp_path / "bundle"), "--episodes", "1", "--flow-steps", "2", *true_form])
    assert json.loads(capsys.readouterr().out)["episodes"] == 1 and calls
    compare_main([str(tmp_path / "bundle"), "--episodes", "1", "--delays-ms", "300"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5


def test_expert_stage_trains_the_expert_and_nothing_else(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(configure(settings, out=tmp_path, stages=settings["stages"][3:]))
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"expert", "action_in", "action_out", "state_in"}


def test_joint_step_gives_the_backbone_the_same_gradients_without_the_expert(settings: dict[str, Any]) -> None:
    """Insulation, through the trainer's own losses: the flow loss changes no backbone gradient."""
    trainer = Trainer(configure(settings))
    joint = trainer.config.stages[2]
    without = joint.model_copy(update={"losses": {k: v for k, v in joint.losses.items() if k != "flow"}})
    gradients = []
    for stage in (joint, without):
        parameters = train.select_parameters(trainer.model, trainer.heads, ("vision", "backbone"))
        trainer.model.zero_grad()
        trainer.accumulate_gradients(stage, np.random.default_rng(0))
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
    for with_flow, alone in zip(*gradients, strict=True):
        assert with_flow is not None and alone is not None and torch.equal(with_flow, alone)


def test_cached_flow_loss_equals_the_full_forward(settings: dict[str, Any]) -> None:
    """`expert_losses` is `robot_losses` without the backbone's graph: same value, same gradients of the expert."""
    trainer = Trainer(configure(settings))
    stage = trainer.config.stages[3]
    batch = trainer.maker.draw_robot(trainer.robot, 2, np.random.default_rng(0))
    found = []
    for losses_of in (trainer.expert_losses, trainer.robot_losses):
        trainer.model.zero_grad()
        loss = losses_of(batch, stage, torch.Generator().manual_seed(1))["flow"]
        loss.backward()
        found.append((loss.detach(), trainer.model.expert.layers[0].mlp.up.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_interrupted_run_resumes_to_the_same_weights(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [stage | {"steps": 4, "checkpoint_every": 2} for stage in settings["stages"][2:]]
    whole = Trainer(configure(settings, out=tmp_path / "whole", stages=stages))
    whole.run()
    config = configure(settings, out=tmp_path / "broken", stages=stages)
    broken = Trainer(config)
    real = broken.accumulate_gradients
    calls = iter(range(100))

    def stop_in_third_step(stage: StageConfig, rng: np.random.Generator) -> dict[str, float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(stage, rng)

    monkeypatch.setattr(broken, "accumulate_gradients", stop_in_third_step)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Trainer(config)
    progress = resumed.load()
    assert (progress.stage, progress.step) == (0, 2)
    resumed.run()
    assert same(weights(whole), weights(resumed))


def test_missed_gate_stops_the_run_and_names_the_figure(settings: dict[str, Any], tmp_path: Path) -> None:
    stage = settings["stages"][3] | {"gates": {"flow_follow": 1.01}}
    with pytest.raises(ConfigurationError, match=r"stage expert: expected \{'flow_follow': 1.01\}, got"):
        Trainer(configure(settings, out=tmp_path, stages=[stage])).run()
    assert not (tmp_path / "policy").exists()
    assert Trainer(configure(settings, out=tmp_path, stages=[stage])).load().stage == 0, "the gate comes again"


def test_figures_of_a_perfect_prediction_are_perfect(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from training.evaluate import offline as module

    trainer = Trainer(configure(settings))
    monkeypatch.setattr(module, "FRAMES", 6)
    monkeypatch.setattr(
        module, "_predict", lambda trainer, batch, with_fast: [("flow", batch.action_BHA.double().numpy())]
    )
    figures = measure(trainer)
    assert figures["flow_follow"] == 1.0
    assert figures["flow_error"] < 1e-3  # state and chunk are kept in float32


def test_data_are_reproducible_and_never_command_held_out_combinations(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = configure(settings)
    meta = make_data(config.data, chunk_timing(config))
    again = make_data(config.data.model_copy(update={"folder": tmp_path}), chunk_timing(config))
    assert again["fingerprint"] == meta["fingerprint"]
    for source, held_out in (("robot", False), ("validation", True)):
        arrays = load_arrays(config.data.folder / source)
        for kinds, target in zip(arrays["kind"], arrays["target"], strict=True):
            assert (COMBINATIONS[kinds[target]] in HELD_OUT) == held_out
    rivals = load_arrays(config.data.folder / "validation")
    own = rivals["rivals"][np.arange(len(rivals["target"])), rivals["target"]]
    np.testing.assert_array_equal(own, rivals["chunk"])
    scenes = load_arrays(config.data.folder / "scenes")
    assert scenes["images"].shape[1:] == (2, 96, 96, 3) and scenes["kind"].shape[1] == MAX_OBJECTS
    assert set(np.unique(scenes["cells"])) - {BACKGROUND} <= set(np.unique(scenes["kind"]))


def test_changed_settings_make_new_data(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configure(settings).data.model_copy(
        update={"folder": tmp_path, "robot_episodes": 2, "scenes": 1, "validation_episodes": 2}
    )
    timing = chunk_timing(configure(settings))
    first = make_data(config, timing)
    assert make_data(config, timing) == first
    second = make_data(config.model_copy(update={"seed": 1}), timing)
    assert second["fingerprint"] != first["fingerprint"]


def test_prefix_delay_reaches_the_loss() -> None:
    _, learned = draw_flow_time(200, 16, 3, torch.Generator().manual_seed(0))
    assert (~learned).sum(dim=1).max() == 3


def test_bad_configurations_name_file_key_and_fault(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(ConfigurationError, match=r"expected a YAML file at .*bad\.yaml, found none"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigurationError, match="not YAML"):
        load_config(path)
    path.write_text(yaml.safe_dump(settings | {"lerning_rate": 1}))
    with pytest.raises(ConfigurationError, match="lerning_rate: Extra inputs are not permitted"):
        load_config(path)
    stages = [settings["stages"][3] | {"robot_batch": 0}]
    path.write_text(yaml.safe_dump(settings | {"stages": stages}))
    with pytest.raises(ConfigurationError, match=r"stages.0: .*losses \['flow'\] need robot_batch > 0"):
        load_config(path)
    path.write_text(yaml.safe_dump(settings | {"probe_layer": 2}))
    with pytest.raises(ConfigurationError, match=r"probe_layer: expected 0\.\.1, before the last layer, got 2"):
        load_config(path)
    path.write_text(yaml.safe_dump(settings))
    assert load_config(path).stages[3].noise_samples == 2


def test_a_step_stays_on_its_device(settings: dict[str, Any], tmp_path: Path) -> None:
    """No card is here: the device "meta" stands for it, where operations check devices and shapes and compute nothing.

    Losses that choose rows by a mask cannot run there, so they are not covered.
    """
    trainer = Trainer(configure(settings, out=tmp_path, prefix_lead=1.0))
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    trainer.device = trainer.maker.device = torch.device("meta")
    for part in (trainer.model, trainer.heads):
        part.to("meta")
    trainer.queries = trainer.queries.to("meta")
    batch = trainer.maker.draw_robot(trainer.robot, 2, rng)
    x_t, time, target, learned = trainer.draw_flow(batch, 2, generator)
    output = trainer.forward(batch, x_t=x_t, time=time, state=trainer.expert_state(batch, 2))
    rows = trainer.query_rows(batch)
    losses.read_out(trainer.heads, take_rows(output.prefix_by_layer[1], rows), batch.readout_BKA)
    losses.next_token_hidden(output.prefix_hidden_BPD, last_token(batch), output.postfix_hidden_BTD)
    trainer.scene_scores(batch, output.probe_logits_BPQ, rows)
    views, cells = trainer.maker.draw_views(trainer.scenes, 2, rng)
    losses.name_cells(trainer.heads, trainer.model.stem_features(views), cells)
    assert {tensor.device.type for tensor in (output.velocity_RHA, target, learned, cells)} == {"meta"}


def test_a_card_that_is_not_there_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a usable NVIDIA card 0, got torch .* that sees 0"):
        Trainer(configure(settings, out=tmp_path, parallel={"device": "cuda"}))
