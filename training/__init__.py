"""The trainer's side: builds the bundle that the robot runs. Imports `ki_vla_ros`, never the other way round."""
