"""The robot's side: from camera messages to joint trajectories through a vision-language-action policy."""
