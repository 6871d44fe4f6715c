"""Installs the robot's side, with launch files, settings and models as share files; training/ runs from a checkout.

Two kinds of commands, since neither serves both kinds of people:
- `ki-vla` is the one on the PATH of who installs with pip; the other names are too common for that.
- `ros2 run` and launch files look for executables in lib/ki_vla_ros. Those are the files of scripts/ros, installed as
  data: colcon copies or (--symlink-install) links them, and they start the python3 of the PATH, so that a virtual
  environment counts, which the interpreter that colcon itself runs in would not.
"""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "ki_vla_ros"


def installed_files() -> list[tuple[str, list[str]]]:
    """(destination below the prefix, files) as `ros2 launch` and the package index look for them."""
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
    install_requires=["lz4", "mcap", "numpy", "pydantic>=2", "pyyaml", "rosbags", "tokenizers", "zstandard"],
    extras_require={
        # Beside a ROS installation python3-opencv is there already, and a robot may prefer onnxruntime-gpu.
        "demo": ["av", "mujoco", "onnxruntime", "opencv-python-headless"],
        # colcon runs a package's tests only when they are announced here.
        "test": ["pytest"],
    },
    zip_safe=False,
    entry_points={"console_scripts": [f"ki-vla = {NAME}.__main__:main"]},
)
