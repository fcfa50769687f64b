"""Builds mpqkern/_C.so and mpqkern/_host*.so with CMake; CMakeLists.txt says what is in them.

Environment: MPQKERN_CUDA=AUTO|ON|OFF, MPQKERN_CUDA_ARCHS="80-real;90a-real", MAX_JOBS=2.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def torch_dir() -> Path:
    """The installed torch, found without importing it.

    pip's build isolation hides site-packages from imports, but the files are there. Asking for torch as a
    build requirement would instead fetch the newest CUDA build, gigabytes, into a throw-away environment.
    """
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations) if spec else []
    places += [f"{sysconfig.get_path(key)}/torch" for key in ("platlib", "purelib")]
    for place in map(Path, places):
        if (place / "include/torch/csrc/stable/library.h").is_file():
            return place
    raise SystemExit(
        "mpqkern builds against an installed torch >= 2.11 and found none. Install it first, then: "
        "pip install --no-build-isolation . (that needs setuptools, cmake, ninja and pybind11 beside it)"
    )


def tool(name: str) -> str:
    """A program of this Python environment, else of the system, which may be older."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise SystemExit(f"mpqkern needs {name} to build and found none; wanted: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.optional:
            self.build_optional(ext)
            return
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = HERE / "build" / "cmake"  # kept between builds; pip's own build folder is not
        settings = {
            "MPQKERN_TORCH": torch_dir(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),  # under build isolation it moves each time
        }
        define = [f"-D{key}={value}" for key, value in settings.items()]
        for key in ("MPQKERN_CUDA", "MPQKERN_CUDA_ARCHS"):  # what the last build was asked for is forgotten
            define.append(f"-D{key}={os.environ[key]}" if key in os.environ else f"-U{key}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        commands = (
            [tool("cmake"), "-G", "Ninja", "-S", HERE, "-B", build, *define],
            [tool("cmake"), "--build", build, "--target", "_C", "-j", jobs],
        )
        try:
            for command in commands:
                subprocess.check_call(command)
        except subprocess.CalledProcessError:  # the folder may remember another compiler or CMake
            shutil.rmtree(build)
            for command in commands:
                subprocess.check_call(command)

    def build_optional(self, ext: Extension) -> None:
        """A target of the build that _C configured; without it everything works, some things slower."""
        target = ext.name.rpartition(".")[2]
        build = HERE / "build" / "cmake"
        done = subprocess.call(
            [tool("cmake"), "--build", build, "--target", target, "-j", os.environ.get("MAX_JOBS", "2")]
        )
        if done != 0:
            print(f"{ext.name} was not built (pybind11 or Python's headers missing?); HiGHS does its work, slower")

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_C":  # one file serves every Python: no version in its name
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)


setup(
    ext_modules=[Extension("mpqkern._C", sources=[]), Extension("mpqkern._host", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
