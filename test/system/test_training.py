"""The recipe end to end at a tiny size: stages, insulation, resuming, gates, data, and a bundle at the end."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.language_files import picture, write_lines, write_pictures
from support.recipes import tiny_run

import training.train
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError
from training.config import TrainingConfig, load_config
from training.data.batch import Batch
from training.evaluate.__main__ import main as evaluate_main
from training.evaluate.executors import main as compare_main
from training.export.__main__ import main as export_main
from training.losses import hints
from training.losses.flow import draw_flow_time
from training.losses.tokens import next_token_hidden
from training.optimizer import select_parameters
from training.run import Run
from training.run import main as train_main
from training.weights.runs import newest_checkpoint, read_state


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings whose data folder the module shares."""
    return tiny_run(tmp_path_factory.mktemp("training"), steps=2)


def configure(settings: dict[str, Any], **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        settings | {key: str(v) if isinstance(v, Path) else v for key, v in changes.items()}
    )


def weights(run: Run, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in run.model.state_dict().items() if name.startswith(prefix)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_whole_run_ends_in_a_bundle_that_drives_the_arm(
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(configure(settings, out=tmp_path / "run"))
    run.run()
    export_main(["--checkpoint", str(tmp_path / "run" / "policy"), "--out", str(tmp_path / "bundle"), "--torch"])
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.provenance.data_fingerprint == run.data.fingerprint()
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
    run = Run(configure(settings, out=tmp_path, stages=settings["stages"][3:]))
    before = weights(run)
    run.run()
    after = weights(run)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"expert", "action_in", "action_out", "state_in"}


def open_gates(run: Run) -> None:
    """Those of the expert's branches start closed, and would hide every fault."""
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith("dense.bias"):
                parameter.fill_(0.5)


def test_joint_step_gives_the_backbone_the_same_gradients_without_the_expert(settings: dict[str, Any]) -> None:
    """Insulation, through the trainer's own losses: the flow loss changes no backbone gradient."""
    run = Run(configure(settings))
    open_gates(run)
    joint = run.config.stages[2]
    without = joint.model_copy(update={"losses": {k: v for k, v in joint.losses.items() if k != "flow"}})
    gradients = []
    for stage in (joint, without):
        parameters = select_parameters(run.model, run.heads, ("vision", "backbone")).values()
        run.model.zero_grad()
        run.trainer.accumulate_gradients(stage, run.trainer.draw(2, stage, 0), np.random.default_rng(0))
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
    for with_flow, alone in zip(*gradients, strict=True):
        assert with_flow is not None and alone is not None and torch.equal(with_flow, alone)


def test_cached_flow_loss_equals_the_full_forward(settings: dict[str, Any]) -> None:
    """`flow_alone` is `joint` without the backbone's graph: the same value, the same gradients for the expert."""
    run = Run(configure(settings))
    open_gates(run)
    stage, losses = run.config.stages[3], run.trainer.losses
    batch = run.data.training["robot"].draw(2, np.random.default_rng(0))
    found = []
    for losses_of in (losses.flow_alone, losses.joint):
        run.model.zero_grad()
        [whole] = losses.split(batch, stage, np.random.default_rng(1))
        loss = losses_of(whole, stage)["flow"]
        loss.backward()
        found.append((loss.detach(), run.model.expert.layers[0].mlp.up.weight.grad.clone()))
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_interrupted_run_resumes_to_the_same_weights(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [stage | {"steps": 4, "checkpoint_every": 2} for stage in settings["stages"][2:]]
    whole = Run(configure(settings, out=tmp_path / "whole", stages=stages))
    whole.run()
    config = configure(settings, out=tmp_path / "broken", stages=stages)
    broken = Run(config)
    real = broken.trainer.accumulate_gradients
    calls = iter(range(100))

    def stop_in_third_step(*step: Any) -> dict[str, float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*step)

    monkeypatch.setattr(broken.trainer, "accumulate_gradients", stop_in_third_step)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Run(config)
    progress, _ = resumed.trainer.load()
    assert (progress.stage, progress.step) == (0, 2)
    resumed.run()
    assert same(weights(whole), weights(resumed))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the log, no room for the weights: files larger than a limit cannot be written."""
    stage = settings["stages"][3] | {"steps": 8, "checkpoint_every": 1}
    given = tmp_path / "run.yaml"
    given.write_text(yaml.safe_dump(settings | {"out": str(tmp_path / "run"), "stages": [stage | {"steps": 2}]}))
    assert train_main([str(given)]) == 0
    given.write_text(
        yaml.safe_dump(settings | {"out": str(tmp_path / "run"), "stages": [stage, stage | {"name": "again"}]})
    )
    before, real = resource.getrlimit(resource.RLIMIT_FSIZE), training.train.open_log
    for limit, fault in (
        (60, "tensorboard/rank0: expected to write the log, got"),
        (1000, "checkpoint-000003/part-00001-of-00001.safetensors: expected to write it whole, got"),
    ):
        capsys.readouterr()

        def open_in_little_room(folder: Path, begins_at: int, limit: int = limit) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            return real(folder, begins_at)

        # Only then: opening the data and trying the policy take room of their own.
        monkeypatch.setattr("training.train.open_log", open_in_little_room)
        try:
            assert train_main([str(given)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        said = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("\r") and "it/s" not in line
        ]
        assert len([line for line in said if line.strip()]) == 1 and fault in said[-1], said
        assert read_state(newest_checkpoint(tmp_path / "run") or tmp_path).step == 0
        assert [path.name for path in sorted((tmp_path / "run").glob("*checkpoint*"))] == [
            "checkpoint-000001",
            "checkpoint-000002",
        ]


def test_broken_samples_are_named_when_they_are_met_and_counted_at_the_end(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also those that a worker met, of a run that was stopped, and of the one that goes on."""
    rows = [{"image": f"{n}.png", "prefix": "what", "suffix": "mug"} for n in range(20)]
    write_pictures(tmp_path, {f"{n}.png": picture(16, 16) for n in range(16)})  # and four are missing
    talk = {"paligemma": str(write_lines(tmp_path / "talk.jsonl", rows)), "broken_percent": 50}
    stage = {
        **settings["stages"][1],
        "losses": {"text": 1.0},
        "steps": 2,
        "sources": {"talk": 60},
        "checkpoint_every": 1,
    }
    sources = settings["sources"] | {"talk": [talk]}
    held_out = settings["held_out"] | {"talk": [talk | {"paligemma": str(tmp_path / "other.jsonl")}]}
    write_lines(tmp_path / "other.jsonl", rows[:2])
    given = {"sources": sources, "held_out": held_out, "out": str(tmp_path / "run"), "workers": 1}
    path = tmp_path / "run.yaml"
    for least, code in ((2.0, 2), (0.0, 0)):
        stages = [stage | {"gates": {"text_accuracy.talk": least}}]
        path.write_text(yaml.safe_dump(settings | given | {"stages": stages}))
        assert train_main([str(path)]) == code
        said = capfd.readouterr().err
        assert said.count("passed over, the next sample takes its place") == 4
        end = said[said.index("talk.jsonl: 4 of 20 samples are broken and were passed over") :]
        assert all(f"talk.jsonl: line {n}: image: expected" in end for n in (17, 18, 19, 20)), end


def test_a_run_of_another_model_or_without_its_hints_is_not_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    stages = settings["stages"][3:]
    Run(configure(settings, out=tmp_path, stages=stages)).run()
    for changes, fault in (
        (
            {"hints": None},
            r"resume .*checkpoint-000001: hints\.readout_frequencies: expected none, as this configuration says",
        ),
        (
            {"model": settings["model"] | {"state": "text"}},
            r"checkpoint-000001: model.state_dim: expected None, .* got 7",
        ),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            Run(configure(settings, out=tmp_path, stages=stages, **changes)).trainer.load()


def test_missed_gate_stops_the_run_and_names_the_figure(settings: dict[str, Any], tmp_path: Path) -> None:
    stage = settings["stages"][3] | {"gates": {"pointing": 1.01}}
    with pytest.raises(ConfigurationError, match=r"stage expert, step 2: expected pointing at least 1.01, got"):
        Run(configure(settings, out=tmp_path, stages=[stage])).run()
    assert not (tmp_path / "policy").exists()
    assert Run(configure(settings, out=tmp_path, stages=[stage])).trainer.load()[0].stage == 0, "the gate comes again"


def test_figures_of_a_perfect_prediction_are_perfect(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from training.evaluate import offline as module

    def perfect(model: Any, embodiment: Any, batch: Batch, *rest: Any) -> list[tuple[str, Any]]:
        return [("flow", batch.action_BHA.double().numpy())]  # type: ignore[union-attr]

    run = Run(configure(settings))
    monkeypatch.setattr(module, "FRAMES", 6)
    monkeypatch.setattr(module, "predict", perfect)
    figures = run.figures()
    assert figures["flow_error"] < 1e-3 and figures["flow_error.elbow"] < 1e-3  # batches are float32
    assert figures["fast_clamped"] < 0.1
    narrow = replace(run.data.embodiment, actions=replace(run.data.actions, lowest=0, highest=1))
    run.data.embodiments["demo_arm"] = narrow
    assert run.figures()["fast_clamped"] > 0.1


def test_prefix_delay_reaches_the_loss() -> None:
    _, learned = draw_flow_time(200, 16, 3, torch.Generator().manual_seed(0))
    assert (~learned).sum(dim=1).max() == 3


def test_bad_configurations_name_file_key_and_fault(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(
        ConfigurationError, match=r"configuration .*bad\.yaml: expected a YAML file, got one that cannot be read"
    ):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigurationError, match="expected YAML, got something else"):
        load_config(path)
    path.write_text(yaml.safe_dump(settings | {"lerning_rate": 1}))
    with pytest.raises(ConfigurationError, match=r"lerning_rate: expected .*no such key"):
        load_config(path)
    stages = [settings["stages"][3] | {"sources": {}}]
    path.write_text(yaml.safe_dump(settings | {"stages": stages}))
    with pytest.raises(ConfigurationError, match=r"stages\.0\.sources: expected at least 1 item"):
        load_config(path)
    stages = [settings["stages"][3] | {"sources": {"web": 2}}]
    path.write_text(yaml.safe_dump(settings | {"stages": stages}))
    with pytest.raises(
        ConfigurationError, match=r"stage expert: sources: expected some of robot, scenes, views, got web"
    ):
        load_config(path)
    path.write_text(yaml.safe_dump(settings | {"hints": settings["hints"] | {"probe_layer": 2}}))
    with pytest.raises(ConfigurationError, match=r"hints\.probe_layer: expected 0\.\.1, before the last layer, got 2"):
        load_config(path)
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key != "hints"}))
    with pytest.raises(ConfigurationError, match=r"stage stem: expected hints for cells, heads, got none"):
        load_config(path)
    path.write_text(yaml.safe_dump(settings))
    assert load_config(path).stages[3].noise_samples == 2


def test_sources_that_cannot_feed_a_stage_are_refused_before_the_first_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    for changes, fault in (
        ({"sources": {"scenes": 2}}, r"stage expert: source scenes: expected targets for .* flow, got none"),
        ({"losses": {"flow": 1.0, "text": 1.0}}, r"stage expert: losses text: expected a source .* got only robot"),
    ):
        stages = [*settings["stages"][:3], settings["stages"][3] | changes]
        with pytest.raises(ConfigurationError, match=fault):
            Run(configure(settings, out=tmp_path, stages=stages)).run()
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_papers_recipe_needs_no_hints(settings: dict[str, Any], tmp_path: Path) -> None:
    """Answers, FAST and flow in one stage, without heads, probe, or labels for cameras or objects."""
    stage = settings["stages"][2] | {"losses": {"text": 1.0, "fast": 1.0, "flow": 1.0}, "train": ["backbone", "expert"]}
    config = configure({**settings, "hints": None}, out=tmp_path, stages=[stage])
    run = Run(config)
    assert run.heads is None
    run.run()
    figures = json.loads((tmp_path / "policy" / "policy.json").read_text())["provenance"]["figures"]
    assert "flow_error" in figures and not {"pointing", "readout_error"} & figures.keys()


def test_a_robot_other_than_the_datas_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data/robot: expected .*base.*, got those of wrist, scene"):
        Run(configure(settings, out=tmp_path, robot="imported_arm", max_prefix_delay=0))
    with pytest.raises(ConfigurationError, match=r"max_prefix_delay: expected less than the horizon 16 .* got 16"):
        Run(configure(settings, out=tmp_path, max_prefix_delay=16))


def test_a_step_stays_on_its_device(settings: dict[str, Any], tmp_path: Path) -> None:
    """The device "meta" stands in for a card: operations check devices and shapes there, and compute nothing.

    Losses that choose rows by a mask cannot run there, so they are not covered.
    """
    run = Run(configure(settings, out=tmp_path, prefix_lead=1.0))
    rng, losses, meta = np.random.default_rng(0), run.trainer.losses, torch.device("meta")
    for part in (run.model, run.heads):
        part.to("meta")
    batch = run.data.training["robot"].draw(2, rng).to(meta)
    x_t, time, target, learned = losses.draw_flow(batch, 2, rng)
    state = losses.expert_state(batch, 2)
    output = run.model(*batch.prefix, batch.postfix_BT, batch.postfix_mask_BT, x_t, time, state, probe=(1, 0))
    next_token_hidden(output.prefix_hidden_BPD, batch.last_token_B, output.postfix_hidden_BTD)
    hints.scene_scores(run.model, batch, output)
    assert {tensor.device.type for tensor in (output.velocity_RHA, target, learned)} == {"meta"}


def test_a_missing_card_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a usable NVIDIA card 0, got torch .* that sees 0"):
        Run(configure(settings, out=tmp_path, parallel={"device": "cuda"}))
