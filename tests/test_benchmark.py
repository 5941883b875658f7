"""The benchmarks' own code, at sizes of a second: the shrunken 27B, its plan against what tensors held, the refusals."""
import re
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

import benchmark


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(benchmark, "CUDA", False)
    # its first use logs an exception, and pytest keeps what that holds: not within a measurement
    bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")(torch.ones(1, 64))


def test_scale_runs_shrunken_and_the_plan_is_within_15_percent(capsys):
    benchmark.scale(SimpleNamespace(size="tiny"))
    out = capsys.readouterr().out
    assert re.search(r"sampling: 256 tokens in .* tokens/s", out) and "% of the limit" in out and re.search("an update on them: .* norm 0", out)
    errors = [int(error) for error in re.findall(r"planned, ([+-]\d+)%", out)]
    assert len(errors) == 2 and all(abs(error) <= 15 for error in errors), out


def test_scale_without_a_gpu_prints_the_plan_of_27b(capsys):
    benchmark.scale(SimpleNamespace(size="27b"))
    out = capsys.readouterr().out
    assert "weights                              15.8 GB" in out and out.endswith("nothing was run: that needs a GPU\n")
    assert all(re.search(f"{size} GB hold [0-9]+ rows in sampling; an update of such rows (fits|does not fit)", out) for size in (24, 48, 80))


@pytest.mark.parametrize("heavy", [dict(num_attention_heads=16, num_key_value_heads=16, head_dim=8, prompt=256, new=64),
                                   dict(intermediate_size=8192, prompt=64, new=8), dict(vocab_size=16384, prompt=16, new=64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_where_attention_the_mlp_or_the_vocabulary_outweighs_all_else(monkeypatch, capsys, heavy, dtype):
    heavy = dict(heavy)
    lengths = {name: heavy.pop(name) for name in ("prompt", "new")}
    small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    monkeypatch.setitem(benchmark.SIZES, "tiny", small | heavy)
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SimpleNamespace(prompts=1, n=4, **lengths))
    if dtype == torch.bfloat16:
        plan_of, random_model = benchmark.plan_of, benchmark.random_model
        monkeypatch.setattr(benchmark, "plan_of", lambda config, _, *rest: plan_of(config, dtype, *rest))
        monkeypatch.setattr(benchmark, "random_model", lambda config, _, device: random_model(config, dtype, device))
    benchmark.scale(SimpleNamespace(size="tiny"))
    errors = [int(error) for error in re.findall(r"planned, ([+-]\d+)%", capsys.readouterr().out)]
    assert len(errors) == 2 and all(abs(error) <= 15 for error in errors)


def test_ways_that_do_not_run_are_told_and_the_others_measured(capsys):
    def broken():
        raise ImportError("no such thing\nand more")

    benchmark.compare("numbers", {"sample": lambda: 10, "half": lambda: 5, "broken": broken}, 2)
    out = capsys.readouterr().out
    assert "does not run here: no such thing\n" in out and out.count("tokens/s") == 2


def test_a_slow_way_runs_once(capsys):
    runs = []
    benchmark.compare("numbers", {"sample": lambda: runs.append("sample") or 10, "half": lambda: runs.append("half") or 5}, 2, patience=-1)
    assert runs == ["sample", "half"] and capsys.readouterr().out.count("one round of over") == 2


def test_training_without_trl_names_the_command(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "training"])
    with pytest.raises(SystemExit, match="pip install trl"):
        benchmark.main()
