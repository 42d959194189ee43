"""Test claims about deep learning, and measure your own models with the tests.

The public surface: what the book uses most, importable from the top. Each name
is loaded when it is first used, so `import reappraisal` itself costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "protocol.claims": ("Claim", "load_claims"),
    "protocol.criteria": ("Criterion",),
    "protocol.ledger": ("Ledger",),
    "protocol.verdicts": ("Verdict",),
    "lab.ensemble": ("Ensemble", "fit", "sweep", "train"),
    "practice.audit": ("audit",),
    "practice.compare": ("compare",),
    "practice.stress": ("stress",),
}
_PUBLIC = {name: room for room, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
