"""Installs the robot's side, with launch files, settings and models as share files; training/ runs from a checkout.

There are two kinds of commands:
- pip puts only `ki-vla` on the PATH; the other commands' names are too common for that.
- `ros2 run` and launch files look for executables in lib/ki_vla_ros. These are the files in scripts/ros, installed as
  data: colcon copies them (or links them with --symlink-install). They start the python3 on the PATH, which may be a
  virtual environment's; console scripts would start the interpreter that colcon itself runs in.
"""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "ki_vla_ros"


def installed_files() -> list[tuple[str, list[str]]]:
    """(Destination below the prefix, files) pairs, where `ros2 launch` and the package index look for them."""
    found = [("share/ament_index/resource_index/packages", [f"resource/{NAME}"]), (f"share/{NAME}", ["package.xml"])]
    found.append((f"lib/{NAME}", sorted(path.as_posix() for path in Path("scripts/ros").iterdir())))
    for folder, pattern in (("launch", "*.launch.py"), ("config", "**/*"), ("models", "**/*")):
        by_parent: dict[str, list[str]] = {}
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_file() and "training" not in path.parts:
                by_parent.setdefault(path.parent.as_posix(), []).append(path.as_posix())
        found += [(f"share/{NAME}/{parent}", files) for parent, files in by_parent.items()]
    return found


setup(
    name=NAME,
    version="0.2.0",
    description="Knowledge-insulated vision-language-action policies as a ROS 2 node",
    author="ki_vla_ros developers",
    maintainer="ki_vla_ros developers",
    maintainer_email="maintainers@ki-vla-ros.invalid",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "sim/*.xml"]},
    data_files=installed_files(),
    install_requires=[
        "lz4",
        "mcap",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "rosbags",
        "simplejpeg",
        "tokenizers",
        "zstandard",
    ],
    extras_require={
        # Not required above: a ROS installation has python3-opencv already, and a robot may prefer onnxruntime-gpu.
        "demo": ["av", "mujoco", "onnxruntime", "opencv-python-headless"],
        "serve": ["msgpack", "websockets>=15"],
        # colcon runs a package's tests only if they are declared here.
        "test": ["pytest"],
    },
    zip_safe=False,
    entry_points={"console_scripts": [f"ki-vla = {NAME}.__main__:main"]},
)
