"""Loading: plain, quantized, LoRA, GGUF, and every refusal in one sentence."""
import json

import pytest
import torch
import transformers
from conftest import JUDGE, gemma_270m, load_script
from safetensors.torch import save_file

grm = load_script("01_pointwise_grm")
PROMPT = torch.tensor([[1, 40, 300, 5, 77, 400]])


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits[0].float()


def linears(model):
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


def test_the_embedded_judge_is_a_small_gemma_3_in_float32_on_the_cpu():
    model, tokenizer = grm.load_model(JUDGE)
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.device.type in ("cpu", "cuda")
    assert model.dtype == (torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert 600 <= len(tokenizer) <= 1000 and not model.training


@pytest.mark.parametrize("quantize, layer, bits", [("nf4", "Linear4bit", 4), ("int8", "Linear8bitLt", 8)])
def test_quantized_weights_stay_close_to_the_plain_ones(quantize, layer, bits):
    plain, (model, _) = logits(grm.load_model(JUDGE)[0]), grm.load_model(JUDGE, quantize)
    assert {type(module).__name__ for module in linears(model)} == {layer}
    assert {module.weight.element_size() for module in linears(model)} == {1}
    error = (logits(model) - plain).norm() / plain.norm()
    assert 0 < error < (0.5 if bits == 4 else 0.15)  # 4 bits on 128 dimensions are rough


def test_layers_in_int8_do_not_speak_in_every_call(caplog):
    model, _ = grm.load_model(JUDGE, "int8")
    logits(model)
    assert "will be cast" not in caplog.text


def test_sampling_leaves_4_bit_layers_differentiable():
    model, tokenizer = grm.load_model(JUDGE, "nf4")
    grm.sample(model, tokenizer, [PROMPT[0].tolist()], max_new_tokens=4, progress=False)
    embedded = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def write_adapter(folder, seed=0, r=4, **changes):
    """A LoRA adapter for the embedded judge in PEFT's format, with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in grm.load_model(JUDGE)[0].named_modules():
        if name.endswith(("q_proj", "down_proj")):
            for part, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
                weights[f"base_model.model.{name}.lora_{part}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
              "base_model_name_or_path": str(JUDGE)} | changes
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


def test_a_lora_folder_loads_its_base_underneath(tmp_path):
    weights = write_adapter(tmp_path)
    model, tokenizer = grm.load_model(tmp_path)
    merged, _ = grm.load_model(JUDGE)
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "down_proj")):  # W + alpha / r * B A
            a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            module.weight.data += 8 / 4 * b @ a
    assert torch.allclose(logits(model), logits(merged), atol=1e-4)
    assert not torch.allclose(logits(model), logits(grm.load_model(JUDGE)[0]), atol=1e-2)


def test_a_lora_folder_loads_in_peft_with_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    write_adapter(tmp_path)
    ours, _ = grm.load_model(tmp_path)
    theirs = peft.PeftModel.from_pretrained(grm.load_model(JUDGE)[0], tmp_path)
    assert torch.allclose(logits(ours), logits(theirs.eval()), atol=1e-4)


def test_a_fresh_lora_changes_nothing_and_trains_alone():
    model, _ = grm.load_model(JUDGE)
    plain = logits(model)
    grm.add_lora(model, ["q_proj", "v_proj"], r=4, alpha=8)
    assert torch.equal(logits(model), plain)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_adapters_leave_out_what_sees_or_hears():
    def part():
        return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})

    model = torch.nn.ModuleDict({"vision_tower": part(), "audio_tower": part(), "language_model": part()})
    grm.add_lora(model, ["q_proj"], r=1, alpha=2)
    assert [name for name, module in model.named_modules() if isinstance(module, grm.LoRA)] == ["language_model.q_proj"]


@pytest.mark.parametrize("changes, message", [
    ({"use_rslora": True}, "only plain LoRA"), ({"target_modules": "all-linear"}, "only plain LoRA"),
    ({"alpha_pattern": {"q_proj": 9}}, "only plain LoRA"), ({"target_modules": ["v_proj"]}, "does not fit its base"),
    ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "or is not whole: .*up_proj.lora_")])
def test_an_adapter_that_cannot_be_read(tmp_path, changes, message):
    write_adapter(tmp_path, **changes)
    with pytest.raises(grm.ModelError, match=message):
        grm.load_model(tmp_path)


def test_a_model_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(grm.ModelError, match="cannot load the model .*no-such-model"):
        grm.load_model("nobody/no-such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(grm.ModelError, match="cannot load the model"):
        grm.load_model(tmp_path)
    with pytest.raises(grm.ModelError, match="no such file|there is no file"):
        grm.load_model(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path / "none", "runs/none", "./none", "runs/02/model"):  # none of them is the name of a model on the Hub
        with pytest.raises(grm.ModelError, match=f"there is no model {folder}: no such file or folder"):
            grm.load_model(folder)


@pytest.mark.parametrize("error, message", [
    (OSError("You are trying to access a gated repo.\nMake sure to have access"), "accept its terms .*hf auth login"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 54.00 GiB"), "not enough memory .* --quantize nf4"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory .* --quantize nf4"),
    (ImportError("Using `bitsandbytes` 4-bit quantization requires accelerate"), "cannot load the model .*requires accelerate")])
def test_refusals_say_what_to_do(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(grm.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(grm.ModelError, match=message) as caught:
        grm.load_model(JUDGE)
    assert "\n" not in str(caught.value)


def test_gguf_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(grm.ModelError, match="pip install gguf"):
        grm.load_model(tmp_path / "model.gguf")


@pytest.mark.gemma
def test_a_broken_gguf_leaves_no_half_conversion(monkeypatch, tmp_path):
    monkeypatch.setenv("SPCT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(grm.ModelError, match="model.gguf cannot be read as a GGUF model"):
        grm.load_model(tmp_path / "model.gguf")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.gemma
def test_gemma_3_270m_from_gguf_knows_its_language():
    model, tokenizer = grm.load_model(gemma_270m())
    assert model.config.sliding_window == 512 and tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    prompt = grm.encode(tokenizer, "The capital of France is Paris. The capital of Italy is")
    [[drawn]] = grm.sample(model, tokenizer, [prompt], temperature=0, max_new_tokens=4, progress=False)
    assert "Rome" in drawn.text or "capital" in drawn.text


def test_memory_plan_of_gemma_2_27b_by_hand():
    config = transformers.Gemma2Config(vocab_size=256000, hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
                                       num_key_value_heads=16, head_dim=128)
    embedding, norms = 256000 * 4608, (4 * 46 + 1) * 4608
    linear = 46 * (2 * 4608 * 4096 + 2 * 4608 * 2048 + 3 * 4608 * 36864)  # q and o, k and v, gate and up and down
    assert embedding + norms + linear == 27_227_128_320
    plan = grm.memory_plan(config, rows=64, columns=1024)
    assert plan["weights"] == 2 * 27_227_128_320
    assert plan["cache"] == 64 * 1024 * 368 * 1024  # 2 x 46 layers x 16 heads x 128 x 2 bytes = 368 KiB a token
    assert plan["logits"] == 64 * 16 * 256000
    a_and_b = 46 * 16 * (2 * (4608 + 4096) + 2 * (4608 + 2048) + 3 * (4608 + 36864))
    assert [plan[name] for name in ("adapters", "gradients", "optimizer")] == [4 * a_and_b, 4 * a_and_b, 8 * a_and_b]
    nf4 = grm.memory_plan(config, "nf4")["weights"] - 2 * (embedding + norms)
    assert nf4 / linear == pytest.approx((4 + 8 / 64 + 32 / 64 / 256) / 8, rel=1e-6)  # 4.127 bits a weight
    assert grm.memory_plan(config, "nf4")["weights"] / 1e9 == pytest.approx(15.8, abs=0.05)
    everything = grm.memory_plan(config, r=0)
    assert everything["adapters"] == 0 and everything["gradients"] == 4 * 27_227_128_320


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_memory_plan_against_the_bytes_of_the_embedded_judge(quantize):
    model, _ = grm.load_model(JUDGE, quantize)
    plan = grm.memory_plan(model.config, quantize, model.dtype, rows=3, columns=20)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in linears(model):
        if quantize == "int8":
            held += module.state.SCB.nbytes  # which the first forward pass moves there
        elif quantize == "nf4":
            held += module.weight.quant_state.absmax.nbytes + module.weight.quant_state.state2.absmax.nbytes
    assert plan["weights"] == pytest.approx(held, rel=0.002)  # small matrices do not fill their last block
    decoder = grm.Decoder(model.eval(), [(1, 40, 300)], [0] * 3, 0, 20, [], 0, torch.Generator(model.device).manual_seed(0))
    assert plan["cache"] == sum(tensor.nbytes for pair in decoder.cache.values() for tensor in pair)
    grm.add_lora(model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], r=16, alpha=32)
    assert plan["adapters"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_what_cannot_fit_is_refused_with_the_numbers(monkeypatch, capsys):
    def free(size):
        monkeypatch.setattr(grm, "free_memory", lambda device: size)

    free(3e6)  # in float32 the judge takes 4.64 MB; in bfloat16 half of that
    with pytest.raises(grm.ModelError, match=r"judge does not fit: its weights \(none\) take 0.00\d+ GB and 0.003 GB of memory are free on .*; "
                                             r"--quantize nf4 would take 0.00\d+ GB$"):
        monkeypatch.setattr(grm.torch.cuda, "is_available", lambda: False)
        grm.load_model(JUDGE)
    free(1e5)
    with pytest.raises(grm.ModelError, match="even --quantize nf4 takes .* GB: choose a smaller model"):
        grm.load_model(JUDGE, "nf4")
    free(1e12)
    grm.load_model(JUDGE)
    assert capsys.readouterr().out == ""  # only a large load is worth a line
    config = transformers.Gemma2Config(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
                                       num_key_value_heads=16, head_dim=128)
    grm.check_memory("big", config, "nf4", torch.bfloat16, torch.device("cpu"))
    assert capsys.readouterr().out == ("big: the weights (nf4) take 15.8 GB of 1e+03 GB that are free on cpu; 2048 tokens of a sample 0.772 GB, "
                                       "training adapters of rank 16 1.83 GB and its activations\n")
