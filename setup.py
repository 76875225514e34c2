"""The packages to install; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# conf/ is installed as superglobal/conf. A checkout, and an editable installation of it, use conf/ itself.
setup(
    packages=[*find_packages(include=["superglobal", "superglobal.*"]), "superglobal.conf"],
    package_dir={"superglobal.conf": "conf"},
)
