"""Built packages contain the configs and the embedded teachers, which lie beside `dparallel/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "teachers")


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which uses the repository's folders
            for name in SHIPPED:
                shutil.copytree(Path(name), Path(self.build_lib, "dparallel", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
