"""Parameters of the node: what ROS stores is in force, and what cannot be in force is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter
from support.bundles import demo_policy, write_test_bundle
from support.loop_rig import Rig

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.ros.parameters import Parameters
from ki_vla_ros.settings.names import parameter_specs

URDF = "<robot name='r'><joint name='elbow' type='revolute'><limit lower='-1' upper='1' velocity='2'/></joint></robot>"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "test")


@pytest.fixture
def make(ros_environment: dict[str, str]) -> Iterator[Callable[..., tuple[Node, Parameters]]]:
    """Makes nodes with parameters, as YAML would set them."""
    context = rclpy.Context()
    rclpy.init(context=context)
    nodes: list[Node] = []

    def make_one(**values: Any) -> tuple[Node, Parameters]:
        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]
        node = rclpy.create_node("policy", context=context, parameter_overrides=overrides)
        nodes.append(node)
        return node, Parameters(node)

    try:
        yield make_one
    finally:
        for node in nodes:
            node.destroy_node()
        rclpy.shutdown(context=context)


def change(node: Node, **values: Any) -> str:
    """Sets parameters atomically; the reason of a refusal, or ""."""
    wanted = [Parameter(name.replace("__", "."), value=value) for name, value in values.items()]
    return str(node.set_parameters_atomically(wanted).reason)


def test_limits_that_leave_a_joint_no_range_are_refused(
    make: Callable[..., tuple[Node, Parameters]], bundle: Bundle
) -> None:
    node, parameters = make(robot_description=URDF)
    parameters.load(bundle.manifest)
    before = parameters.settings
    for values, reason in [
        ({"limits__joints__elbow__lower": 5.0}, "'elbow': bundle, URDF and limits.joints leave no range, from 5 to 1"),
        ({"limits__joints__elbow__lower": 1.0}, "from 1 to 1"),  # within the bundle's limits, not within the URDF's
        ({"limits__joints__elbow__upper": -1.0, "limits__velocity_scale": 0.5}, "from -1 to -1"),
    ]:
        assert reason in change(node, **values)
        assert parameters.settings is before
        assert node.get_parameter("limits.joints.elbow.lower").value == -1e9
    assert change(node, limits__joints__elbow__lower=0.5) == ""
    assert change(node, limits__velocity_scale=0.05) == ""
    limits = parameters.settings.limits
    assert (limits.of("elbow").lower, limits.velocity_scale) == (0.5, 0.05)


def test_a_set_with_one_bad_value_changes_nothing(make: Callable[..., tuple[Node, Parameters]], bundle: Bundle) -> None:
    node, parameters = make()
    parameters.load(bundle.manifest)
    before, stored = parameters.settings, parameters.values
    assert "horizon" in change(node, limits__velocity_scale=0.5, execution_horizon_s=10.0)
    assert "'nothing'" in change(node, limits__velocity_scale=0.5, executor="nothing")
    assert "no range" in change(node, limits__velocity_scale=0.5, limits__joints__elbow__upper=-9.0)
    assert parameters.settings is before and parameters.values == stored
    # The service of `ros2 param set` takes them one by one, and says of each whether it is in force.
    results = node.set_parameters(
        [Parameter("limits.velocity_scale", value=0.5), Parameter("limits.joints.elbow.upper", value=-9.0)]
    )
    assert [result.successful for result in results] == [True, False]
    assert parameters.settings.limits.velocity_scale == 0.5
    assert parameters.settings.limits.of("elbow").upper == before.limits.of("elbow").upper


@pytest.mark.parametrize("parameter", [spec.name for spec in parameter_specs((), ("elbow",)) if spec.changeable])
def test_what_is_accepted_can_be_adopted(
    make: Callable[..., tuple[Node, Parameters]], bundle: Bundle, parameter: str, rig: Rig
) -> None:
    """Every changeable parameter at the ends of its range, alone and beside the others' extremes."""
    node, parameters = make()
    parameters.load(bundle.manifest)
    spec = next(spec for spec in parameter_specs((), ("elbow",)) if spec.name == parameter)
    texts = ("asynchronous", "rtc_trained", "exact", "clamp", "stop")
    values = texts if isinstance(spec.default, str) else (spec.minimum, spec.maximum)
    if isinstance(spec.default, bool):
        values = (not spec.default,)
    others = {"prefill_period_s": 0.0, "limits.joints.elbow.lower": 3.0, "rate_hz": 50.0, "inference_delay": 4}
    for value, (name, other) in product(values, others.items()):
        wanted = {name: other, parameter: value}
        typed = [Parameter(n, value=type(node.get_parameter(n).value)(v)) for n, v in wanted.items()]
        if node.set_parameters_atomically(typed).successful:
            rig.loop.adopt(parameters.settings)
            for changed in typed:
                assert parameters.values[changed.name] == changed.value
        parameters.settings.validate_against(bundle.manifest)


def test_the_clock_does_not_change_under_a_configured_node(
    make: Callable[..., tuple[Node, Parameters]], bundle: Bundle
) -> None:
    node, parameters = make()
    assert change(node, use_sim_time=True) == "" and change(node, use_sim_time=False) == ""
    parameters.load(bundle.manifest)
    assert change(node, use_sim_time=False) == ""
    assert "changes only while the node is unconfigured" in change(node, use_sim_time=True)
    assert node.get_parameter("use_sim_time").value is False and not node.get_clock().ros_time_is_active
    parameters.unload()
    assert change(node, use_sim_time=True) == ""


def test_on_humble_too_what_is_stored_is_in_force(
    make: Callable[..., tuple[Node, Parameters]], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rclpy has no callback after parameters are set."""
    monkeypatch.delattr(Node, "add_post_set_parameters_callback")
    node, parameters = make()
    parameters.load(bundle.manifest)
    assert change(node, rate_hz=20.0, limits__velocity_scale=0.5) == ""
    assert (parameters.settings.rate_hz, parameters.settings.limits.velocity_scale) == (20.0, 0.5)
    assert "'executor'" in change(node, rate_hz=10.0, executor="nothing")
    assert parameters.settings.rate_hz == 20.0
    assert [r.successful for r in node.set_parameters([Parameter("rate_hz", value=15.0)])] == [True]
    assert parameters.settings.rate_hz == 15.0


def test_another_bundle_after_cleanup(
    make: Callable[..., tuple[Node, Parameters]], bundle: Bundle, tmp_path: Path
) -> None:
    """Parameters of the first bundle's joints do not keep the second one out, unless someone has set them."""
    one_camera = demo_policy(cameras=[{"name": "front"}])
    other = write_test_bundle(tmp_path / "other", one_camera)
    node, parameters = make()
    parameters.load(bundle.manifest)
    assert change(node, limits__joints__elbow__velocity=0.5) == ""
    parameters.unload()
    assert parameters.load(other.manifest).limits.of("elbow").velocity == 0.5  # a limit survives
    assert not node.has_parameter("cameras.wrist.topic") and node.has_parameter("cameras.front.topic")
    parameters.unload()
    assert node.has_parameter("cameras.front.topic")
    assert parameters.load(bundle.manifest).limits.of("elbow").velocity == 0.5
