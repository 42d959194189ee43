"""A book of a few cells in a temporary folder, and the command run on it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from reappraisal.protocol.book import select
from reappraisal.protocol.cache import Store
from reappraisal.protocol.execute import notebook_bytes

CHECKOUT = Path(__file__).parent.parent
COMMAND = [
    sys.executable, "-c", "from reappraisal.protocol.cli import main; main()"
]
PARAMETERS = 'scale = "book"\nwidth = 3'


def notebook(*sources, prose="Words.", parameters=PARAMETERS):
    """A notebook's JSON: a title, the parameters, one cell a source."""
    cells = [
        {"cell_type": "markdown", "id": "title", "metadata": {},
         "source": f"# Title\n\n{prose}"}
    ]
    for i, source in enumerate([parameters, *sources]):
        if source is None:
            continue
        tags = {"tags": ["parameters"]} if i == 0 else {}
        cells.append(
            {"cell_type": "code", "id": f"cell-{i}", "metadata": tags,
             "source": source.splitlines(keepends=True), "outputs": [],
             "execution_count": None}
        )
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": spec},
            "nbformat": 4, "nbformat_minor": 5}


class TinyBook:
    """A checkout with a store, made in `root`."""

    def __init__(self, root: Path):
        self.root = root
        (root / "nbs").mkdir(parents=True)
        settings = "[DEFAULT]\nlib_name = reappraisal\nnbs_path = nbs\n" \
            "allowed_metadata_keys = reappraisal\n" \
            "allowed_cell_metadata_keys = tags\nclean_ids = False\n" \
            "requirements = numpy>=2 pyyaml>=6\n"
        (root / "settings.ini").write_text(settings)
        self.store = Store(root / ".reappraisal")

    def path(self, name):
        return self.root / "nbs" / f"{name}.ipynb"

    def add(self, name, *sources, **options):
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(notebook_bytes(notebook(*sources, **options)))
        return self.chapter(name)

    def chapter(self, name):
        return select(self.root, [name])[0]

    def module(self, name, text):
        path = self.root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(self.root).parents:
            init = self.root / folder / "__init__.py"
            if folder != Path(".") and not init.exists():
                init.write_text("")
        path.write_text(text)

    def results(self):
        return sorted((self.root / ".reappraisal/results").rglob("*.result"))

    def outputs(self, name):
        book = json.loads(self.path(name).read_bytes())
        return [c["outputs"] for c in book["cells"] if "outputs" in c]

    def start(self, *words, **options):
        env = os.environ | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=options.pop("cwd", self.root), env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # a shell in the background hands on an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        )

    def command(self, *words, **options):
        """Run `reappraisal`; its exit code and all that it said."""
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out + err


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"
