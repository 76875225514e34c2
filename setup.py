"""List the packages to install. All other settings of the installation are in pyproject.toml."""

from setuptools import find_packages, setup

# conf/ is installed as superglobal/conf. A checkout and an editable installation use conf/ directly.
setup(
    packages=[*find_packages(include=["superglobal", "superglobal.*"]), "superglobal.conf"],
    package_dir={"superglobal.conf": "conf"},
)
