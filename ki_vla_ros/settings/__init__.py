"""Every setting once: its ROS parameter, the parameter file, and the session that a bag holds."""
