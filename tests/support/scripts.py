"""Scripts as modules, for tests of the scripts themselves: nothing else imports from `scripts/`."""

import importlib.util
import sys
from types import ModuleType

from support import ROOT


def script(name: str) -> ModuleType:
    """Load `scripts/NAME.py` as the module `script_NAME`; the same one each time."""
    known, folder = f"script_{name}", str(ROOT / "scripts")
    if known not in sys.modules:
        if folder not in sys.path:
            sys.path.append(folder)  # as Python does for a script, for the scripts that it imports
        spec = importlib.util.spec_from_file_location(known, ROOT / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[known]
