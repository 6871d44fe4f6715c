"""The demo: a simulated arm does what it is told, over ROS; measured, recorded and filmed."""
