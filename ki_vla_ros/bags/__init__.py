"""Recordings: reads rosbag2 bags whole or damaged, finds the session in them, writes mcap."""
