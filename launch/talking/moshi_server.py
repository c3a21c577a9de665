"""moshi's `ServerState`, of a module that starts a server when it is imported as it is."""

from __future__ import annotations

import ast
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from types import CodeType
from typing import Any

_MODULE = "moshi.server"
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class _DefinitionsAlone(SourceFileLoader):
    """Imports a module without the statements that do something: here, the one that serves."""

    def get_code(self, fullname: str) -> CodeType:
        # Not the loader's own way, which would leave this code as the module's in __pycache__.
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        tree.body = [statement for statement in tree.body if isinstance(statement, _DEFINITIONS)]
        return self.source_to_code(tree, path)


def server_state_class() -> Any:
    """`moshi.server.ServerState`, of the installed moshi.

    Raises:
        RuntimeError: it has no such module or class.
    """
    found = find_spec(_MODULE)
    if found is None or found.origin is None:
        raise RuntimeError(f"{_MODULE}: not found; moshi isn't installed as tested")
    loader = _DefinitionsAlone(_MODULE, found.origin)
    spec = spec_from_loader(_MODULE, loader)
    if spec is None:
        raise RuntimeError(f"{found.origin}: can't be imported")
    module = module_from_spec(spec)
    loader.exec_module(module)
    if "ServerState" not in vars(module):
        raise RuntimeError(f"{found.origin}: has no ServerState")
    return vars(module)["ServerState"]
