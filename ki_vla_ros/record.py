"""The command `python -m ki_vla_ros.record`, whose code is in ros/recorder.py."""

import sys

from ki_vla_ros.ros.recorder import main

if __name__ == "__main__":
    sys.exit(main())
