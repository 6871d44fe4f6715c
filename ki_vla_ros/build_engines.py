"""The command `python -m ki_vla_ros.build_engines`, whose code is in engines/build.py."""

import sys

from ki_vla_ros.engines.build import main

if __name__ == "__main__":
    sys.exit(main())
