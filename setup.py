"""Build from settings.ini, the one place for metadata and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
SUFFIX = "_requirements"
extras = {
    key.removesuffix(SUFFIX): value.split()
    for key, value in cfg.items()
    if key.endswith(SUFFIX)
}
extras["chapters"] += extras["cluster"]
extras["book"] += extras["chapters"]



class WithRegistrations(build_py):
    """Put a copy of the registered claims into built packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / cfg["lib_path"] / "registrations"
            self.mkpath(str(target))
            for path in sorted(Path("registrations").glob("*.yml")):
                self.copy_file(str(path), str(target))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[f"{cfg['lib_name']}*"]),
    package_data={"": ["py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["reappraisal=reappraisal.protocol.cli:main"],
    },
    cmdclass={"build_py": WithRegistrations},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
