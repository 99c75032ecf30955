"""The command `docs`: the docstrings of the public modules as one folder of pages, by pdoc."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from branchcore import recipes

_ONE_PAGE = (
    *("checkpoint", "ops", "reference", "rewards"),
    *("models.accelerate", "models.digits", "models.runtime"),
)
"""Packages whose page has what their `__all__` names, and none of their modules has its own."""
_NO_PAGE = (
    *("kernels", "cli", "docs_command", "model_commands", "train_command", "models.commands"),
    *("coins", "heartbeat", "history", "idle", "pace", "policy", "pruning_sums"),
    *("rounds", "run_folder", "run_state", "waves", "models.adapters", "models.cross_attention"),
    *("models.loading", "models.patches", "models.schedules", "models.sharing", "models.sizing"),
    *("models.softmax_attention", "recipes.option_types", "recipes.scale"),
)
"""Commands, and what only other modules call."""


def docs_options(docs: argparse.ArgumentParser) -> None:
    """Adds the options of `docs`."""
    docs.add_argument("--out", type=Path, required=True, help="folder of the pages")
    docs.set_defaults(run=_docs)


def _docs(args: argparse.Namespace) -> None:
    print(f"wrote {write_docs(args.out)}")


def public_modules() -> list[str]:
    """Returns the names of the modules that have a page, packages before what is in them."""
    found = ["branchcore"]
    for name in found:
        if name.removeprefix("branchcore.") in _ONE_PAGE:
            continue
        package = importlib.import_module(name)
        # not __path__: in a checkout it has the folder that the package lies in
        folder = str(Path(package.__file__ or "").parent)
        inside = pkgutil.iter_modules([folder]) if hasattr(package, "__path__") else ()
        names = sorted(f"{name}.{m.name}" for m in inside if not m.name.startswith("_"))
        found += [x for x in names if x.removeprefix("branchcore.") not in _NO_PAGE]
    return found


def write_docs(out: Path) -> Path:
    """Writes the pages and returns the first one, `index.html`; none of them asks a network.

    For a process of its own: pdoc reads the modules, and some are completed for it.

    Args:
        out: folder, made if it is not there; files of the same names are replaced.

    Raises:
        RuntimeError: pdoc is not installed, or it warns, of a type that it cannot find, say.
        OSError: the folder cannot be written.
    """
    loaded = {name: importlib.import_module(name) for name in public_modules()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        texts = _texts(loaded)
    # of pdoc; others, of deprecation, are about packages
    faults = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    if faults:
        raise RuntimeError(f"docs: docstrings must render without a warning, got {faults[0]!r}")
    for name, text in texts.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return out / "index.html"


def _texts(loaded: Mapping[str, ModuleType]) -> dict[str, str]:
    """Returns the text of every file of the folder, by its path."""
    try:
        from pdoc import doc, render
    except ImportError as error:
        raise RuntimeError(
            "docs: pdoc must be installed, got none; try pip install 'branchcore[docs]'"
        ) from error
    # methods are found as files: no list in the code names them
    recipes.__dict__["__all__"] = sorted({*recipes.__all__, *recipes.RECIPES})
    for module in loaded.values():
        _resolve_fields(vars(module).values())
    pages = {name: doc.Module(module) for name, module in loaded.items()}
    for name, page in pages.items():
        page.submodules = [p for n, p in pages.items() if n.rpartition(".")[0] == name]
    render.configure(docformat="google", show_source=False)
    texts = {
        f"{name.replace('.', '/')}.html": render.html_module(page, pages)
        for name, page in pages.items()
    }
    return texts | {"index.html": render.html_index(pages), "search.js": render.search_index(pages)}


def _resolve_fields(values: Iterable[Any]) -> None:
    """Makes types of the names of types in NamedTuples, and drops what Python says about them."""
    for found in values:
        if inspect.isclass(found) and issubclass(found, tuple) and hasattr(found, "_fields"):
            found.__new__.__annotations__.update(get_type_hints(found))
            found.__new__.__doc__ = None
            for member in vars(found).values():
                if (member.__doc__ or "").startswith("Alias for field number"):
                    member.__doc__ = None
