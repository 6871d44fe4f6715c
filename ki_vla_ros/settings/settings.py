"""Every runtime setting once: default, unit, range, and whether it may change while the node is configured.

ROS parameters are declared from this model (ros/parameters.py), so each name, bound and description stands only here.
Nested models become dotted names: `limits.velocity_scale`, `cameras.<camera>.topic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError, ParameterError, did_you_mean
from ki_vla_ros.robot import GRIPPER_COMMAND, JOINT_STATE, Robot
from ki_vla_ros.settings.limits import UNLIMITED, LimitSettings, SettingsModel, setting

ReferenceName = Literal["joint_states", "command"]

ExecutorName = Literal["synchronous", "asynchronous", "temporal_ensemble", "rtc", "rtc_trained"]
JacobianName = Literal["identity", "exact"]

TorchModeName = Literal["auto", "eager", "compile", "graph", "compile_graph"]


# Where a robot without a robot file takes commands.
DEFAULT_COMMAND = "arm_controller/joint_trajectory"


class CameraSettings(SettingsModel):
    topic: str = setting(
        "",
        "topic of this camera; empty: as the robot file says, else camera/<name>/image_raw, or image_raw/compressed if "
        "transport says so",
    )
    transport: Literal["", "raw", "compressed"] = setting(
        "",
        "raw: sensor_msgs/Image; compressed: sensor_msgs/CompressedImage (jpeg, png); empty: as the robot file says, "
        "else raw",
    )
    max_age_s: float = setting(
        0.0, "oldest image of this camera that may be acted upon; 0: as max_age_s", unit="s", ge=0.0, le=5.0
    )


class Settings(SettingsModel):
    """What the user may choose. `cameras` holds the cameras that the YAML names; others have their default topic."""

    bundle: str = setting("", "folder of the model bundle, or the name of a bundle shipped in models/")
    robot: str = setting(
        "",
        "robot file of this robot, or the name of one in config/robots/, for topics, outputs and limits other than the "
        "bundle's own; empty: as the bundle says",
    )
    engine: Literal["onnx", "torch", "tensorrt", "tensorrt_rtx"] = setting(
        "onnx",
        "inference engine; torch needs the wheel torch and a bundle exported with --torch, the TensorRT ones an NVIDIA "
        "card and the module of the same name",
    )
    provider: Literal["cpu", "cuda", "tensorrt"] = setting(
        "cpu", "what runs the engine: the processor, an NVIDIA card, or (engine onnx) TensorRT inside onnxruntime"
    )
    torch_mode: TorchModeName = setting(
        "auto",
        "engine torch; eager: operation by operation; compile: by torch.compile, which needs a compiler and takes "
        "seconds to minutes at configure; graph: as CUDA graphs (provider cuda); compile_graph: both; auto: eager on a "
        "cpu, graph on cuda",
    )
    policy_server: str = setting(
        "",
        "ws://host:port of a policy server in openpi's protocol, which computes the chunks in place of an engine; the "
        "bundle says what the robot is; empty: the engine",
    )
    policy_server_keys: str = setting(
        "robot", "what the policy server calls the parts of an observation: robot, a name in config/serve/, or a file"
    )
    policy_server_token: str = setting("", "file with the token that the policy server asks for; empty: none")
    policy_server_timeout_s: float = setting(
        0.5,
        "longest wait for the policy server's answer, and for a connection; then the arm is held, and the next tick "
        "asks anew",
        unit="s",
        ge=0.05,
        le=10.0,
    )
    policy_server_wait_s: float = setting(
        10.0,
        "how long configure waits for a policy server that is not there yet; the node does nothing else meanwhile",
        unit="s",
        ge=0.0,
        le=600.0,
    )
    engine_cache: str = setting("", "TensorRT: folder of built engines; empty: ~/.cache/ki_vla_ros/engines")
    threads: int = setting(1, "processor threads of the engine", ge=1, le=64)
    autostart: bool = setting(False, "configure and activate at start, without a lifecycle client")
    instruction: str = setting("", "task at start; empty means hold until one arrives on ~/instruction")

    rate_hz: float = setting(
        10.0, "ticks per second; each tick may compute a chunk", unit="Hz", ge=0.5, le=50.0, changeable=True
    )
    execution_horizon_s: float = setting(
        0.1,
        "how long a chunk is executed before a newer one takes over, rounded to whole ticks; longer means fewer "
        "inferences and slower reactions",
        unit="s",
        ge=0.02,
        le=10.0,
        changeable=True,
    )
    executor: ExecutorName = setting(
        "asynchronous", "how chunks are executed and joined; see runtime/chunking.py", changeable=True
    )
    publish_mode: Literal["replace", "splice", "stream"] = setting(
        "replace",
        "replace: trajectories that start when they arrive; splice: the same, stamped with the present, so that their "
        "way to the controller costs no time, for controllers on the node's clock; stream, where the robot file gives "
        "an output no type: one Float64MultiArray of positions per command_period_s, for controllers that forward "
        "commands",
    )
    inference_delay: int = setting(
        -1,
        "rtc and rtc_trained: d, the actions that are consumed while the next chunk is computed; -1: the 95th "
        "percentile of recent measurements",
        ge=-1,
        le=100,
        changeable=True,
    )
    guidance_horizon_s: float = setting(
        0.0,
        "rtc: how long after its observation a new chunk is guided towards the running one; 0: to the latter's end",
        unit="s",
        ge=0.0,
        le=10.0,
        changeable=True,
    )
    guidance_weight: float = setting(
        5.0, "rtc: largest strength of the guidance (beta)", ge=0.0, le=100.0, changeable=True
    )
    guidance_jacobian: JacobianName = setting(
        "identity",
        "rtc: derivative of the predicted action that the guidance uses; exact: the paper's, which needs engine torch "
        "and costs about three expert steps instead of one",
    )
    ensemble_decay: float = setting(
        0.01,
        "temporal_ensemble: how fast the weight of newer chunks falls off, exp(-decay * i) with i = 0 the oldest; "
        "negative trusts the newest most",
        ge=-5.0,
        le=5.0,
        changeable=True,
    )
    lead_s: float = setting(
        0.01,
        "a motion takes over from the one before it this long after it is computed: what publishing and the "
        "controller's next cycle take",
        unit="s",
        ge=0.0,
        le=0.5,
        changeable=True,
    )
    command_period_s: float = setting(
        0.02, "time between the points of a command; acceleration is constant between them", unit="s", ge=0.002, le=0.2
    )
    hold_after_s: float = setting(
        0.5,
        "watchdog: a moving arm without a fresh chunk for this long is brought to rest",
        unit="s",
        ge=0.05,
        le=10.0,
        changeable=True,
    )
    ramp_in_s: float = setting(
        0.5,
        "after activation, a stop or a reset the speed limits rise from a tenth to their full value over this time",
        unit="s",
        ge=0.0,
        le=30.0,
        changeable=True,
    )
    dry_run: bool = setting(False, "compute and report everything, but send nothing to the controller", changeable=True)
    shadow: bool = setting(
        False,
        "someone else moves the arm: commands go to ~/shadow/command, or with several outputs to ~/shadow/OUTPUT, and "
        "never to a controller, and /diagnostics says how far the policy's commands are from what the arm does",
    )
    shadow_reference: ReferenceName = setting(
        "joint_states",
        "shadow: what the policy is compared with: the joint_states that followed, or the command that someone else "
        "sends to the controllers",
    )
    flow_steps: int = setting(
        0, "Euler steps from noise to actions; 0 means as many as the bundle says", ge=0, le=100, changeable=True
    )
    noise_seed: int = setting(0, "seed of the noise that each chunk starts from", ge=0, le=2**31 - 1, changeable=True)

    max_age_s: float = setting(
        0.25,
        "oldest observation (by stamp, on the node's clock) that may still be acted upon",
        unit="s",
        ge=0.02,
        le=5.0,
        changeable=True,
    )
    sync_slop_s: float = setting(
        0.05,
        "largest difference between the stamps of one observation's images",
        unit="s",
        ge=0.0,
        le=1.0,
        changeable=True,
    )

    joint_max_age_s: float = setting(
        0.0, "oldest joint state that may be acted upon; 0: as max_age_s", unit="s", ge=0.0, le=5.0
    )
    prefill_period_s: float = setting(
        0.0,
        "run the backbone only this often and the expert at every tick, on the keys and values of the last prefill and "
        "the newest joint state; 0: both at every tick; needs a bundle that feeds the state as a token",
        unit="s",
        ge=0.0,
        le=5.0,
        changeable=True,
    )
    max_kv_age_s: float = setting(
        0.5,
        "oldest images behind keys and values that are reused",
        unit="s",
        ge=0.02,
        le=5.0,
        changeable=True,
    )
    align_to_cameras: bool = setting(
        True,
        "move the ticks, by at most 2 ms each, to shortly after the images arrive, so that they act on the newest; "
        "only where the period of the ticks is a multiple of the cameras'",
        changeable=True,
    )
    use_receive_time: bool = setting(
        False,
        "use the time of arrival instead of the header's stamp, for drivers that do not stamp; late messages then "
        "count as fresh",
    )
    robot_description: str = setting("", "URDF whose joint limits apply where they are tighter; empty: none")

    joint_states_topic: str = setting(
        "", "sensor_msgs/JointState topic to read; empty: as the robot file says, which may name several"
    )
    command_topic: str = setting(
        "",
        "topic of the robot's controller: trajectory_msgs/JointTrajectory, std_msgs/Float64MultiArray for stream, or "
        "what the robot file says; empty: as the robot file says, as it must be where that names several outputs",
    )
    cameras: Mapping[str, CameraSettings] = Field(default_factory=dict)
    limits: LimitSettings = LimitSettings()

    def camera(self, name: str) -> CameraSettings:
        """The camera's settings, with its topic and transport filled in."""
        chosen = self.cameras.get(name, CameraSettings())
        transport = chosen.transport or "raw"
        suffix = "/compressed" if transport == "compressed" else ""
        topic = chosen.topic or f"camera/{name}/image_raw{suffix}"
        return chosen.model_copy(update={"topic": topic, "transport": transport})

    def on_robot(self, robot: Robot) -> Settings:
        """The same with the robot file's topics and transports of cameras where these settings name none."""
        cameras = dict(self.cameras)
        for spec in robot.cameras:
            chosen = cameras.get(spec.name, CameraSettings())
            topic, transport = spec.topic or "", chosen.transport or spec.transport
            if topic and transport != spec.transport:  # the same images, as image_transport names them
                packed = transport == "compressed"
                topic = f"{topic}/compressed" if packed else topic.removesuffix("/compressed")
            cameras[spec.name] = chosen.model_copy(update={"topic": chosen.topic or topic, "transport": transport})
        return self.model_copy(update={"cameras": cameras})

    def signal_topics(self, robot: Robot) -> dict[str, str]:
        """The topics that the robot's signals come from, as chosen here, by their names in the robot file.

        `joint_states_topic` replaces the one topic of joint states; where there are several, `validate_against` says
        so.
        """
        topics = {signal.topic: signal.topic for signal in robot.signals}
        joints = {signal.topic for signal in robot.signals if signal.type == JOINT_STATE}
        if self.joint_states_topic and len(joints) == 1:
            topics[joints.pop()] = self.joint_states_topic
        return topics

    def command_topics(self, robot: Robot | None) -> dict[str, str]:
        """The topic, or action, of each of the robot's outputs by its name; of an unknown robot, of the only one."""
        if robot is None:
            return {"": self.command_topic or DEFAULT_COMMAND}
        only = self.command_topic if len(robot.outputs) == 1 else ""
        return {output.name: only or output.topic for output in robot.outputs}

    def validate_against(self, manifest: PolicySpec) -> None:
        """Raises ParameterError with all settings that do not fit the loaded bundle."""
        if problems := list(self._misfits(manifest)):
            raise ParameterError(problems)

    def _misfits(self, manifest: PolicySpec) -> Iterator[str]:
        cameras, joints = [camera.name for camera in manifest.cameras], list(manifest.axis_names)
        for table, known, used in (("cameras", cameras, self.cameras), ("limits.joints", joints, self.limits.joints)):
            for name in used:
                if name not in known:
                    yield (
                        f"parameter '{table}.{name}.*': bundle {manifest.name!r} has only "
                        f"{', '.join(known)}{did_you_mean(name, known)}"
                    )
        topics = sorted({signal.topic for signal in manifest.robot.signals if signal.type == JOINT_STATE})
        if len(topics) != 1 and self.joint_states_topic not in ("", *topics):
            yield (
                f"parameter 'joint_states_topic': the robot file of bundle {manifest.name!r} reads joint states from "
                f"{', '.join(topics) or 'no topic'}, got {self.joint_states_topic}, which replaces only a single one; "
                "leave it empty, and remap the topics"
            )
        if self.provider == "tensorrt" and self.engine != "onnx":
            yield (
                f"parameter 'provider': expected cpu or cuda for engine {self.engine}, got tensorrt, which is a part "
                "of onnxruntime; for TensorRT itself set engine to tensorrt and provider to cuda"
            )
        if self.engine in ("tensorrt", "tensorrt_rtx") and self.provider != "cuda":
            yield (
                f"parameter 'provider': expected cuda for engine {self.engine}, which runs only on NVIDIA cards, got "
                f"{self.provider}"
            )
        if self.guidance_jacobian == "exact" and self.engine != "torch":
            yield (
                f"parameter 'guidance_jacobian': exact needs an engine with a backward pass, got engine {self.engine}; "
                "set engine to torch, or guidance_jacobian to identity"
            )
        yield from self._server_misfits()
        for axis in manifest.axes:
            chosen, rotation = self.limits.of(axis.name), axis.kind == "rotation"
            placeless = rotation or (axis.kind == "velocity" and not axis.measured)
            if placeless and (chosen.lower > -UNLIMITED or chosen.upper < UNLIMITED):
                why = (
                    "a rotation, which is counted anew at each rest" if rotation else "a velocity that nobody measures"
                )
                yield (
                    f"parameter 'limits.joints.{axis.name}': expected no lower or upper, which bound a place, for {why}"
                    f", got {chosen.lower:g} and {chosen.upper:g}; set its velocity or acceleration"
                )
        yield from self._output_misfits(manifest.robot)
        chunk_s = manifest.horizon * manifest.action_period_s
        if self.execution_horizon_s + 1.0 / self.rate_hz > chunk_s + 1e-9:
            yield (
                f"parameter 'execution_horizon_s': got {self.execution_horizon_s:g} s at rate_hz {self.rate_hz:g}, "
                f"but a chunk of bundle {manifest.name!r} lasts {chunk_s:g} s and must outlast execution_horizon_s by "
                f"one tick; set at most {chunk_s - 1.0 / self.rate_hz:g}"
            )
        executed = round(self.execution_horizon_s / manifest.action_period_s)
        delay = self.inference_delay
        if delay >= 0 and not delay <= max(executed, 1) <= manifest.horizon - delay:
            yield (
                f"parameter 'inference_delay': expected d <= s <= H - d, got d = {delay}, s = {executed} "
                f"(execution_horizon_s {self.execution_horizon_s:g}), H = {manifest.horizon} actions"
            )
        if self.guidance_horizon_s > chunk_s + 1e-9:
            yield (
                f"parameter 'guidance_horizon_s': got {self.guidance_horizon_s:g} s, but a chunk of bundle "
                f"{manifest.name!r} lasts {chunk_s:g} s"
            )
        if self.prefill_period_s > 0.0 and manifest.state.in_prompt and not manifest.state.as_token:
            yield (
                f"parameter 'prefill_period_s': got {self.prefill_period_s:g} s, but bundle {manifest.name!r} has the "
                "joint state only in the prompt, so every new state needs a prefill; set 0, or train with state: both"
            )
        if self.prefill_period_s > self.max_kv_age_s:
            yield (
                f"parameter 'prefill_period_s': expected at most max_kv_age_s ({self.max_kv_age_s:g} s), got "
                f"{self.prefill_period_s:g} s"
            )
        if self.executor == "rtc_trained" and max(delay, 1) > manifest.max_prefix_delay:
            yield (
                f"parameter 'executor': rtc_trained needs a model trained on clean prefixes of {max(delay, 1)} or more "
                f"actions, bundle {manifest.name!r} was trained on up to {manifest.max_prefix_delay}; use rtc, or "
                "train with max_prefix_delay"
            )

    def _server_misfits(self) -> Iterator[str]:
        if not self.policy_server:
            return
        if not self.policy_server.startswith(("ws://", "wss://")):
            yield f"parameter 'policy_server': expected ws://host:port, got {self.policy_server!r}"
        if self.guidance_jacobian == "exact":
            yield "parameter 'guidance_jacobian': got exact, but a policy server takes it as the identity; set identity"
        if self.prefill_period_s > 0.0:
            yield (
                f"parameter 'prefill_period_s': got {self.prefill_period_s:g} s, but a policy server computes all of a "
                "chunk at once; set 0"
            )

    def _output_misfits(self, robot: Robot) -> Iterator[str]:
        outputs = robot.outputs
        if self.command_topic and len(outputs) > 1:
            topics = ", ".join(f"{output.topic} ({output.name})" for output in outputs)
            yield (
                f"parameter 'command_topic': got {self.command_topic!r}, but the robot file of the bundle has "
                f"{len(outputs)} outputs: {topics}; leave it empty, and remap the topics that are called otherwise"
            )
        for output in outputs:
            # A gripper's action beside streams takes goals, whatever publish_mode says of the others.
            beside = output.type == GRIPPER_COMMAND and any(other.streams("stream") for other in outputs)
            if self.publish_mode == "stream" and not output.streams("stream") and not beside:
                yield (
                    f"parameter 'publish_mode': got stream, but the robot file gives output {output.name!r} the type "
                    f"{output.type}, which is no stream; set replace or splice"
                )
        if self.publish_mode == "splice" and all(output.streams("splice") for output in outputs):
            types = ", ".join(sorted({str(output.type) for output in outputs}))
            yield (
                f"parameter 'publish_mode': got splice, which is for trajectories, but the robot file has only outputs "
                f"of {types}; leave it out"
            )

    def validate_change(self, configured: Settings) -> None:
        """Raises ConfigurationError where these settings allow more than those that the node was configured with."""
        if name := self.limits.loosened(configured.limits):
            raise ConfigurationError(
                f"parameter {name!r}: while a bundle is loaded limits may only become tighter than at configure; "
                "clean up first"
            )
