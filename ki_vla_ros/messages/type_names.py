"""The ROS types that we read, write or look for, by the names that graphs and bags give them."""

from typing import Final

IMAGE: Final = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE: Final = "sensor_msgs/msg/CompressedImage"
JOINT_STATE: Final = "sensor_msgs/msg/JointState"
POSE: Final = "geometry_msgs/msg/PoseStamped"
TRAJECTORY: Final = "trajectory_msgs/msg/JointTrajectory"
POSITIONS: Final = "std_msgs/msg/Float64MultiArray"
TEXT: Final = "std_msgs/msg/String"
DIAGNOSTICS: Final = "diagnostic_msgs/msg/DiagnosticArray"
