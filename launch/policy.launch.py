"""Starts the policy, configures it and, unless told otherwise, activates it; all of this once.

    ros2 launch ki_vla_ros policy.launch.py params_file:=my_robot.yaml bundle:=/path/to/bundle
    ros2 launch ki_vla_ros policy.launch.py params_file:=my_robot.yaml activate:=false
    ros2 launch ki_vla_ros policy.launch.py params_file:=my_robot.yaml record:=true    # see docs/runtime.md

Whatever happens later is done by whoever orders it: a node that is cleaned up and configured by hand, or that is
started again after a crash (respawn), is not activated.

`IncludeLaunchDescription` leaves its arguments behind for what is included after it. Who includes this file more than
once puts each into a `GroupAction`, as in docs/deploy.md.

Start the cameras with the same Fast DDS profile (see config/fastdds.xml). If the environment variable
FASTDDS_DEFAULT_PROFILES_FILE is set already, or FASTRTPS_DEFAULT_PROFILES_FILE, as Humble's Fast DDS calls it, it is
left as it is.
"""

import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import matches_action
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

CONFIG = Path(get_package_share_directory("ki_vla_ros")) / "config"
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
PROFILE_VARIABLE = PROFILE_VARIABLES[os.environ.get("ROS_DISTRO") == "humble"]
RESPAWN_DELAY_S = 2.0


def launch_policy(context: LaunchContext) -> list:
    params_file = file_of("params_file", context)
    if params_file is None:
        raise ValueError("launch argument params_file: expected the node's parameter file, got ''")
    chosen = {"autostart": False}  # this file leads the node through its states; see also --no-autostart
    for name in ("bundle", "instruction"):
        if value := LaunchConfiguration(name).perform(context):
            chosen[name] = ParameterValue(value, value_type=str)
    if urdf := file_of("urdf", context):
        chosen["robot_description"] = ParameterValue(urdf.read_text(encoding="utf-8"), value_type=str)
    clock = {}
    if LaunchConfiguration("use_sim_time").perform(context):
        clock["use_sim_time"] = is_true("use_sim_time", context)
    profile = EnvironmentVariable(
        PROFILE_VARIABLES[0],
        default_value=EnvironmentVariable(PROFILE_VARIABLES[1], default_value=str(CONFIG / "fastdds.xml")),
    )
    policy = LifecycleNode(
        package="ki_vla_ros",
        executable="policy_node",
        name=LaunchConfiguration("name"),
        namespace=LaunchConfiguration("namespace"),
        parameters=[str(params_file), {**chosen, **clock}],
        arguments=["--no-autostart"],  # a parameter could be set again by a later section of params_file
        additional_env={PROFILE_VARIABLE: profile},
        respawn=is_true("respawn", context),
        respawn_delay=RESPAWN_DELAY_S,
        output="screen",
    )
    # The recorder comes first: it waits for the policy, and its subscriptions must be there for the first tick.
    recorders = [recorder(context, profile, clock)] if is_true("record", context) else []
    return [*recorders, policy, *lead(policy, activate=is_true("activate", context))]


def lead(policy: LifecycleNode, activate: bool) -> list:
    """Configures the node once and, with `activate`, activates it if that succeeds."""

    def change(transition: int) -> EmitEvent:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(policy), transition_id=transition))

    # Whoever started this launch has ordered one activation. It is used up by the first attempt to configure, whether
    # or not that succeeds, and by the process's end: after that someone else decides.
    orders = [Transition.TRANSITION_ACTIVATE] if activate else []

    def obey(context: LaunchContext) -> list:
        due = orders.copy() if context.locals.event.goal_state == "inactive" else []
        orders.clear()
        return [change(order) for order in due]

    return [
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=policy,
                start_state="configuring",
                entities=[OpaqueFunction(function=obey)],
            )
        ),
        RegisterEventHandler(
            OnProcessExit(target_action=policy, on_exit=[OpaqueFunction(function=lambda _context: orders.clear())])
        ),
        change(Transition.TRANSITION_CONFIGURE),
    ]


def recorder(context: LaunchContext, profile: EnvironmentVariable, clock: dict) -> Node:
    folder = LaunchConfiguration("record_to").perform(context)
    return Node(
        package="ki_vla_ros",
        executable="record",
        name="recorder",
        namespace=LaunchConfiguration("namespace"),
        parameters=[clock] if clock else [],
        arguments=["--policy", LaunchConfiguration("name"), *(["--out", folder] if folder else [])],
        additional_env={PROFILE_VARIABLE: profile},
        output="screen",
    )


def is_true(name: str, context: LaunchContext) -> bool:
    value = LaunchConfiguration(name).perform(context)
    if value.lower() not in ("true", "false"):
        raise ValueError(f"launch argument {name}: expected true or false, got {value!r}")
    return value.lower() == "true"


def file_of(name: str, context: LaunchContext) -> Path | None:
    """The file that the argument names, None if it is empty; launch would go on without one that does not exist."""
    value = LaunchConfiguration(name).perform(context)
    if value and not Path(value).is_file():
        raise ValueError(f"launch argument {name}: expected a file, got {value!r}, which is missing")
    return Path(value) if value else None


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            # No default: a file for another arm, or none, means limits and topics that nobody chose.
            DeclareLaunchArgument("params_file", description="parameters of the node (YAML)"),
            DeclareLaunchArgument(
                "bundle", default_value="", description="model bundle, a folder or a name; empty: as params_file says"
            ),
            DeclareLaunchArgument(
                "instruction", default_value="", description="task at start; empty: as params_file says"
            ),
            DeclareLaunchArgument(
                "activate",
                default_value="true",
                description="false: configure only, and leave activation to a lifecycle client",
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
                "record_to",
                default_value="",
                description="folder to create for the bag; empty: the policy's name and the time",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
            DeclareLaunchArgument(
                "name", default_value="policy", description="name of the node; params_file needs a section for it"
            ),
            DeclareLaunchArgument(
                "respawn",
                default_value="false",
                description="true: start the node again if it dies; it then waits unconfigured for a lifecycle client",
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="",
                description="true: node and recorder take the time from /clock; empty: as params_file says",
            ),
            OpaqueFunction(function=launch_policy),
        ]
    )
