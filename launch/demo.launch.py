"""Starts the simulated arm and the policy that moves it, with config/demo.yaml.

    ros2 launch ki_vla_ros demo.launch.py instruction:="touch the blue pole"
    ros2 topic pub --once /policy/instruction std_msgs/msg/String "data: point at the white cube"

The scene is built for the instruction given at start. Without one, the scene of config/demo.yaml (scene_seed 0) has a
white pole, a white cube, a blue pole and a green pole. It runs until Ctrl-C. For episodes with a judge, a video and
figures, use `ros2 run ki_vla_ros demo`.
"""

import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

SHARE = Path(get_package_share_directory("ki_vla_ros"))
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
PROFILE_VARIABLE = PROFILE_VARIABLES[os.environ.get("ROS_DISTRO") == "humble"]
PASSED_ON = (
    "params_file", "bundle", "instruction", "activate", "record", "record_to", "namespace", "respawn", "use_sim_time",
)  # fmt: skip


def launch_arm(context: LaunchContext) -> list:
    # The scene is built for this instruction; if it is empty, the scene has its own task.
    chosen = {"task": ParameterValue(LaunchConfiguration("instruction"), value_type=str)}
    if LaunchConfiguration("use_sim_time").perform(context):
        chosen["use_sim_time"] = ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)
    own_profile = str(SHARE / "config" / "fastdds.xml")
    profile = EnvironmentVariable(
        PROFILE_VARIABLES[0], default_value=EnvironmentVariable(PROFILE_VARIABLES[1], default_value=own_profile)
    )
    arm = Node(
        package="ki_vla_ros",
        executable="sim_arm",
        name="sim_arm",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), chosen],
        additional_env={PROFILE_VARIABLE: profile},
        output="screen",
    )
    return [arm]


def generate_launch_description() -> LaunchDescription:
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "policy.launch.py")),
        launch_arguments=[(name, LaunchConfiguration(name)) for name in PASSED_ON],
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "params_file", default_value=str(SHARE / "config" / "demo.yaml"), description="parameters of both nodes"
            ),
            DeclareLaunchArgument("bundle", default_value="", description="model bundle; empty: as params_file says"),
            DeclareLaunchArgument("instruction", default_value="", description="task at start; empty: wait for one"),
            DeclareLaunchArgument(
                "activate", default_value="true", description="false: leave the policy's activation to someone else"
            ),
            DeclareLaunchArgument("record", default_value="false", description="true: record the policy into a bag"),
            DeclareLaunchArgument(
                "record_to",
                default_value="",
                description="folder to create for the bag; empty: the policy's name and the time",
            ),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of both nodes and all topics"),
            DeclareLaunchArgument(
                "respawn", default_value="false", description="true: start the policy again if it dies, unconfigured"
            ),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="",
                description="true: all take the time from /clock, which something else publishes",
            ),
            OpaqueFunction(function=launch_arm),
            GroupAction([policy]),  # it keeps the arguments to itself
        ]
    )
