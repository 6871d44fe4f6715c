"""What a robot is: its cameras, joints and the timing of its actions, read from one YAML file."""
