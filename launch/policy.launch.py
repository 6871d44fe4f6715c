"""Starts the policy and leads it through configure to active.

    ros2 launch ki_vla_ros policy.launch.py params_file:=my_robot.yaml bundle:=/path/to/bundle
    ros2 launch ki_vla_ros policy.launch.py params_file:=my_robot.yaml record:=true    # see docs/runtime.md

Start the cameras with the same Fast DDS profile (see config/fastdds.xml). If the environment variable
FASTDDS_DEFAULT_PROFILES_FILE is set already, it is left as it is.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.events import matches_action
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

CONFIG = Path(get_package_share_directory("ki_vla_ros")) / "config"


def launch_policy(context: LaunchContext) -> list:
    chosen = {"autostart": False}  # this file leads the node through its states
    for name in ("bundle", "instruction"):
        if value := LaunchConfiguration(name).perform(context):
            chosen[name] = ParameterValue(value, value_type=str)
    if urdf := LaunchConfiguration("urdf").perform(context):
        chosen["robot_description"] = ParameterValue(Path(urdf).read_text(encoding="utf-8"), value_type=str)
    profile = EnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", default_value=str(CONFIG / "fastdds.xml"))
    policy = LifecycleNode(
        package="ki_vla_ros",
        executable="policy_node",
        name="policy",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), chosen],
        additional_env={"FASTDDS_DEFAULT_PROFILES_FILE": profile},
        output="screen",
    )

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(policy), transition_id=transition))

    activate_when_configured = RegisterEventHandler(
        OnStateTransition(
            target_lifecycle_node=policy,
            # Without start_state this would also reactivate the node after every later deactivation by hand.
            start_state="configuring",
            goal_state="inactive",
            entities=[change(Transition.TRANSITION_ACTIVATE)],
        )
    )
    # The recorder comes first: it waits for the policy, and its subscriptions must be there for the first tick.
    recorders = [recorder(context, profile)] if is_true("record", context) else []
    return [*recorders, policy, activate_when_configured, change(Transition.TRANSITION_CONFIGURE)]


def recorder(context: LaunchContext, profile: EnvironmentVariable) -> Node:
    folder = LaunchConfiguration("record_to").perform(context)
    return Node(
        package="ki_vla_ros",
        executable="record",
        name="recorder",
        namespace=LaunchConfiguration("namespace"),
        arguments=["--out", folder] if folder else [],
        additional_env={"FASTDDS_DEFAULT_PROFILES_FILE": profile},
        output="screen",
    )


def is_true(name: str, context: LaunchContext) -> bool:
    value = LaunchConfiguration(name).perform(context)
    if value.lower() not in ("true", "false"):
        raise ValueError(f"launch argument {name}: expected true or false, got {value!r}")
    return value.lower() == "true"


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "params_file", default_value=str(CONFIG / "demo.yaml"), description="parameters of the node (YAML)"
            ),
            DeclareLaunchArgument(
                "bundle", default_value="", description="model bundle, a folder or a name; empty: as params_file says"
            ),
            DeclareLaunchArgument(
                "instruction", default_value="", description="task at start; empty: as params_file says"
            ),
            DeclareLaunchArgument(
                "urdf", default_value="", description="URDF file whose joint limits apply where they are tighter"
            ),
            DeclareLaunchArgument(
                "record",
                default_value="false",
                description="true: record what the policy reads and publishes into a bag",
            ),
            DeclareLaunchArgument(
                "record_to", default_value="", description="folder to create for the bag; empty: policy_ and the time"
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
            OpaqueFunction(function=launch_policy),
        ]
    )
