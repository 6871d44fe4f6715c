"""The demo: a simulated arm does what it is told, over ROS, and the run is measured, recorded and filmed."""
