"""Build from settings.ini, the one place for metadata and requirements."""

import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

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

VERDICTS = "verdicts.json"
MIME = "application/vnd.reappraisal.verdict+json"


def stored_verdicts():
    """Take the verdicts' records out of the notebooks, as they are."""
    if not Path("nbs").is_dir():  # built from a source archive
        return Path(VERDICTS).read_text(encoding="utf-8")
    found = {}
    for path in sorted(Path("nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        records = [
            output["data"][MIME]
            for cell in cells
            for output in cell.get("outputs", [])
            if MIME in output.get("data", {})
        ]
        if records:
            chapter = path.relative_to("nbs").with_suffix("").as_posix()
            found[chapter] = records
    book = cfg["doc_host"] + cfg["doc_baseurl"]
    return json.dumps({"book": book, "verdicts": found}, sort_keys=True)


class WithRegistrations(build_py):
    """Put copies of claims and verdicts into built packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / cfg["lib_path"]
            target = package / "registrations"
            self.mkpath(str(target))
            for path in sorted(Path("registrations").glob("*.yml")):
                self.copy_file(str(path), str(target))
            (package / VERDICTS).write_text(stored_verdicts(), "utf-8")


class WithVerdicts(sdist):
    """Put the verdicts into source archives, which have no notebooks."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / VERDICTS).write_text(stored_verdicts(), "utf-8")


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
        "console_scripts": ["reappraisal=reappraisal.practice.command:main"],
    },
    cmdclass={"build_py": WithRegistrations, "sdist": WithVerdicts},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
