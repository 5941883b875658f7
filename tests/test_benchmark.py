"""tests/tools: the benchmark's own code at sizes of a second, and the page of votes."""

import re
import sys
from types import SimpleNamespace

import benchmark
import pytest
import show_votes
from conftest import ROOT


def options(**more) -> SimpleNamespace:
    known = {"gemma": None, "old": None, "only_old": False, "prompts": 2, "repeats": 1}
    known |= {"dtypes": False, "llama": None}
    return SimpleNamespace(**{"size": "tiny", "model": None, "quantize": "nf4", **known, **more})


def test_sampling_measures_every_way(monkeypatch, capsys):
    # this checkout in the place of the first edition: its `sample` takes other arguments
    monkeypatch.setattr(benchmark, "generate_batch", lambda *ask: benchmark.generate(*ask))
    known = benchmark.settings
    monkeypatch.setattr(benchmark, "settings", lambda **_: known(max_new_tokens=16))
    medians = benchmark.sampling(options(old=str(ROOT), prompts=1))
    out = capsys.readouterr().out
    assert list(medians) == ["sample", "generate", "generate, static cache", "generate_batch"]
    assert "first edition            does not run here: " in out and out.count("tokens/s") == 4
    assert min(medians.values()) > 0


def test_llama_cpp_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit, match="pip install xllamacpp"):
        benchmark.llama_cpp("model.gguf", None, [[1, 2]], 2, 4)


def test_sampling_measures_dtypes(monkeypatch, capsys):
    known = benchmark.settings
    monkeypatch.setattr(benchmark, "settings", lambda **_: known(max_new_tokens=8))
    medians = benchmark.sampling(options(dtypes=True, prompts=1))
    assert [*medians][:3] == ["sample, bfloat16", "sample, nf4", "sample, float32"]
    assert "generate, bfloat16" in medians and min(medians.values()) > 0


def test_tokens_are_counted_up_to_the_end():
    assert benchmark.count([[5, 6, 2, 0, 0], [5, 3, 2], [5, 6]], [2, 3]) == 3 + 2 + 2
    samples = [[SimpleNamespace(ids=[5, 2]), SimpleNamespace(ids=[5])]]
    assert benchmark.count(samples, [2]) == 3


def test_what_is_slow_runs_once():
    runs = []
    ways = {"sample": lambda: runs.append("a") or [[1]], "b": lambda: runs.append("b") or [[1]]}
    benchmark.compare(ways, 2, [0], patience=-1)
    assert runs == ["a", "b"]


def test_a_training_step_is_measured(monkeypatch, capsys):
    known = benchmark.settings
    small = {"prompts": 2, "group_size": 2, "max_new_tokens": 8}
    monkeypatch.setattr(benchmark, "settings", lambda **of: known(**of | small))
    benchmark.training(options())
    assert re.search(r"rollout \d+\.\d\d s, update \d+\.\d\d s; the", capsys.readouterr().out)


def test_the_memory_plan_by_hand():
    llama = benchmark.grm.transformers.LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    # a layer's linears: queries 8 x 8, keys and values 8 x 4, output 8 x 8, three of 8 x 16
    inside, others = 2 * (64 + 2 * 32 + 64 + 3 * 128), 2 * 10 * 8 + 5 * 8  # embeddings, norms
    ends = 2 * (16 + 2 * 12 + 16 + 3 * 24)  # inputs and outputs of the linears
    plan = benchmark.memory_plan(llama, "none", columns=100, samples=3, r=4)
    assert plan["weights"] == 2 * (inside + others)
    assert plan["cache"] == 100 * 2 * 4 * 2 * 2  # keys and values of 4 numbers, 2 layers, 2 bytes
    assert plan["logits"] == 16 * 3 * 10
    assert plan["adapters"] == plan["gradients"] == 4 * 4 * ends
    assert plan["optimizer"] == 2 * 4 * 4 * ends
    packed = benchmark.memory_plan(llama, "nf4", r=0)
    assert packed["weights"] == inside // 2 + inside // 64 + 2 * others
    assert packed["gradients"] == 4 * (inside + others) and packed["adapters"] == 0
    outputs = 2 * (8 + 2 * 4 + 8 + 2 * 16 + 8)
    assert benchmark.memory_plan(llama, "int8")["weights"] == inside + 4 * outputs + 2 * others


def test_scale_runs_shrunken_and_prints_the_plan_of_27b(capsys):
    benchmark.scale(options())
    out = capsys.readouterr().out
    assert re.search(r"sampling: \d+ tokens", out) and "an update on them" in out
    benchmark.scale(options(size="27b")) if not benchmark.CUDA else None
    benchmark.scale(options(model=str(ROOT / "tests" / "tiny" / "judge")))
    assert "nothing was run" in capsys.readouterr().out


def judged(number: int, order: list[int], scores, query: str = "q", text: str = "t"):
    step = show_votes.step
    item = step.Judgement(query, ["<i>good", "bad"], [1.0, 0.0])
    one = step.show(item, number, order)
    one.scores, one.output, one.reason = scores, text, "" if scores else "no <box>"
    return one


def test_the_page_of_votes_shows_what_was_decided_and_escapes_text(tmp_path, monkeypatch):
    samples = [judged(0, [0, 1], [2, 3], "<script>", "</details>&"), judged(0, [1, 0], [1, 9])]
    samples += [judged(1, [0, 1], [9, 1]), judged(1, [0, 1], [9, 1])]  # always right: not shown
    samples += [judged(2, [0, 1], None, [{"role": "user", "content": "hi <b>"}])] * 2  # a tie
    samples += [judged(3, [0, 1], [3, 4]), judged(3, [0, 1], None)]
    text = show_votes.page("a <file>", samples)
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == [show_votes.KINDS[0, 1], show_votes.KINDS[0, 0]]
    assert "&lt;script&gt;" in text and "&lt;/details&gt;&amp;" in text and "a &lt;file&gt;" in text
    assert "<script" not in text and "<i>" not in text and "no &lt;box&gt;" in text
    assert "<td>2</td><td><b>9</b></td><td>1</td><td><b>11</b></td><td>4</td>" in text
    assert "Response 1 is y2, Response 2 is y1" in text and "default-src 'none'" in text

    file, out = tmp_path / "samples.jsonl", tmp_path / "votes.html"
    lines = [show_votes.step.json.dumps(show_votes.step.asdict(one)) for one in samples[2:4]]
    file.write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["show_votes.py", str(file), str(out)])
    show_votes.main()
    assert "There is no such item" in out.read_text(encoding="utf-8")
