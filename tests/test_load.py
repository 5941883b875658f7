"""Loading a model: quantized, with adapters, and what is refused in one line."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import JUDGE, gemma_270m, load_script, refusal
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

grm = load_script("01_pointwise_grm")
IDS = torch.tensor([[1, 40, 300, 5, 77, 400]])
SHAPE = {"vocab_size": 739, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits[0].float().cpu()


def draw(model, tokenizer, prompts, length=3):
    return grm.sample(model, tokenizer, prompts, 0.0, SimpleNamespace(max_new_tokens=length))


def base():
    return AutoModelForCausalLM.from_pretrained(JUDGE, dtype=torch.float32)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_random(folder, family, **changes) -> str:
    """A small random model of another family, with the embedded tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    kind = transformers.AutoModelForSeq2SeqLM if family == "T5" else AutoModelForCausalLM
    model = kind.from_config(config)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(JUDGE).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits", ["none", "nf4", "int8"])
def test_a_model_is_as_it_was_stored_and_samples_and_learns(bits, tmp_path):
    model, tokenizer = grm.load_model(str(JUDGE), bits, "float32")
    grm.check_model(model, tokenizer)
    error = (logits(model) - logits(base())).norm() / logits(base()).norm()
    low, high = {"none": (0, 1e-4), "nf4": (0.01, 0.5), "int8": (0.001, 0.15)}[bits]
    assert low <= error < high and not model.training  # 4 bits of 128 dimensions are rough
    projections = [one for name, one in model.named_modules() if name.endswith("_proj")]
    assert {one.weight.element_size() for one in projections} == {4 if bits == "none" else 1}
    assert bits != "nf4" or all(one.weight.quant_state.nested for one in projections)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored, _ = grm.load_model(str(tmp_path), dtype="float32")  # integers are no weights
    assert torch.allclose(logits(stored), logits(model), atol=1e-4)
    for one in (model, stored):
        assert draw(one, tokenizer, IDS.tolist())[0]
        embedded = one.get_input_embeddings()(IDS.to(one.device)).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0
    assert grm.load_model(str(JUDGE), dtype="bfloat16")[0].dtype == torch.bfloat16


RATES = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
RIGHT = {"GPT2": RATES, "Llama": {"attention_dropout": 0.5}, "OPT": {"word_embed_proj_dim": 32}}
DROPOUTS = {"attention_dropout": 0.5, "hidden_dropout": 0.5}  # Falcon asks its config for them
RIGHT |= {"Falcon": {"alibi": False, **DROPOUTS}, "Cohere": {"logit_scale": 0.1}}
RIGHT |= {"Mixtral": {"router_jitter_noise": 0.5, "num_key_value_heads": 4}}
RIGHT |= {"Mistral": {"sliding_window": 400, "num_key_value_heads": 4}}


@pytest.mark.parametrize("family", RIGHT)
def test_other_families_are_sampled_rightly_and_drop_nothing_in_training(family, tmp_path):
    model, tokenizer = grm.load_model(save_random(tmp_path, family, **RIGHT[family]))
    grm.check_model(model, tokenizer)
    assert torch.equal(logits(model.train()), logits(model.eval()))


def test_a_token_that_nothing_uses_may_be_missing(tmp_path):
    """Gemma 3's tokenizer has one token more than its model."""
    shutil.copytree(JUDGE, tmp_path / "m")
    change(tmp_path / "m" / "tokenizer_config.json", pad_token="[PAD]")
    model, tokenizer = grm.load_model(str(tmp_path / "m"))
    grm.check_model(model, tokenizer)
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert len(draw(model, tokenizer, [[1, 40, 300], [1, 5]])) == 2


ADAPTERS = {
    "no tokenizer": {},
    "own tokenizer": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 40}},
    "all linear layers": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    "some layers": {"target_modules": r".*layers\.[13]\..*(q|v)_proj"},
    "head": {"modules_to_save": ["lm_head"]},  # the head and the embeddings are tied
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"bias": "all", "lora_bias": True},
    "DoRA": {"use_dora": True},
    "IA3": {"feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_gives_peft_s_logits_or_is_refused(kind, tmp_path):
    peft = pytest.importorskip("peft")
    lora = {} if kind == "IA3" else {"r": 4, "lora_alpha": 8}
    config = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | lora
    config = (peft.LoraConfig if lora else peft.IA3Config)(**config | ADAPTERS[kind])
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape) * weight.requires_grad
    model.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(JUDGE)
    own.chat_template = "{{ messages[0].content }}" if kind == "own tokenizer" else None
    if kind != "no tokenizer":
        own.save_pretrained(tmp_path)
    wanted = logits(peft.PeftModel.from_pretrained(base(), tmp_path).eval())
    assert not torch.allclose(wanted, logits(base()), atol=1e-2)
    try:
        loaded, tokenizer = grm.load_model(str(tmp_path), dtype="float32")
    except grm.UserError:
        assert kind == "DoRA"
    else:
        assert torch.allclose(logits(loaded), wanted, atol=1e-4)
        assert tokenizer.get_vocab() == own.get_vocab()
        assert tokenizer.chat_template == own.chat_template
        quantized = kind == "own tokenizer" and grm.load_model(str(tmp_path), "nf4")[0]
        assert not quantized or quantized.is_loaded_in_4bit


TEMPLATES = {
    "template raises": "{{ raise_exception('no system turn') }}",
    "template does not compile": "{% for m in messages %}{{ m.content }",
    "template loses the prompt": "{% for p in messages[0].content %}{{ p.text }}{% endfor %}",
    "template writes a token that the model lacks": "{{ messages[0].content }}<turn>",
}
WRONG = {"GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}, "Rwkv": {}}
WRONG |= {"Llama": {"sliding_window": 400}}  # which it does not have
WRONG |= {"Mamba": {}, "Jamba": {"num_experts": 2, "mamba_d_state": 4}, "T5": {"d_model": 32}}
KINDS = "name|path|empty|no weights|torn|run|too few weights|EOS ends prompts".split("|")


@pytest.mark.parametrize("kind", [*KINDS, *TEMPLATES, *WRONG])
def test_what_is_refused(kind, monkeypatch, capsys, tmp_path):
    model = tmp_path / "m"
    named = "nobody/no-such-model" if kind == "name" else str(model)
    shutil.copytree(JUDGE, model / "model" if kind == "run" else model)
    if kind == "name":  # without a network the Hub's client waits between its attempts
        monkeypatch.setattr("time.sleep", lambda seconds: None)
    if kind in ("path", "empty"):
        shutil.rmtree(model)
    if kind == "empty":
        model.mkdir()
    elif kind == "run":
        named += "/model"  # what is told to give
    elif kind == "no weights":
        (model / "model.safetensors").unlink()
    elif kind == "torn":
        (model / "model.safetensors").write_bytes(b"\1" * 5000)
    elif kind == "too few weights":
        more = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}
        change(model / "config.json", **more)
    elif kind == "EOS ends prompts":
        (model / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(JUDGE)
        tokenizer.chat_template, both = None, [("<bos>", 1), ("<eos>", 2)]
        ends = TemplateProcessing(single="<bos> $A <eos>", special_tokens=both)
        tokenizer.backend_tokenizer.post_processor = ends
        tokenizer.save_pretrained(model)
    elif kind in TEMPLATES:
        tokenizer = AutoTokenizer.from_pretrained(JUDGE)
        tokenizer.add_tokens(["<turn>"])
        tokenizer.save_pretrained(model)
        (model / "chat_template.jinja").write_text(TEMPLATES[kind])
    elif kind in WRONG:
        shutil.rmtree(model)
        save_random(model, kind, **WRONG[kind])
    asked = "--model", named.removesuffix("/model"), "--query", "q", "--response", "a"
    told = refusal(monkeypatch, capsys, tmp_path, "01_pointwise_grm.py", *asked)
    if kind == "EOS ends prompts":
        named = "ends the prompt with EOS"
    elif kind in ("Llama", "GPTNeo"):
        named = "the model's own"  # the logits differ
    assert kind in [*TEMPLATES, "Rwkv", "Mamba", "Jamba", "T5"] or named in told


def test_bfloat16_hides_no_wrong_sampler(tmp_path):
    folder = save_random(tmp_path, "GPTNeo", **WRONG["GPTNeo"])
    with pytest.raises(grm.UserError, match="a logit is .*, the model's own "):
        grm.check_model(*grm.load_model(folder, dtype="bfloat16"))


@pytest.mark.gemma
@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_gemma_3_270m_samples_what_generate_does(bits):
    model, tokenizer = grm.load_model(gemma_270m(), bits)
    grm.check_model(model, tokenizer)
    texts = "The capital of France is", "One, two, three,"
    prompts = [grm.encode_turns(tokenizer, [text]) for text in texts]
    examples = JUDGE.parent / "shots.jsonl"
    prompts.append(grm.encode(tokenizer, grm.read_lines(examples)[0], examples))
    for prompt, ids_drawn in zip(prompts, draw(model, tokenizer, prompts, 12)):
        ids = torch.tensor([prompt], device=model.device)
        wanted = model.generate(ids, do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert ids_drawn and ids_drawn == wanted[: len(ids_drawn)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_faster_dtype_is_advised(dtype, monkeypatch, capsys):
    """Half of the time in bfloat16 with AVX512-BF16, several times as long with AVX2 alone.
    AVX512 without it and other processors were not measured: nothing is said."""
    model, tokenizer = grm.load_model(str(JUDGE), dtype=dtype)
    x86 = {"avx2": True, "avx512_f": False, "avx512_bf16": False}
    cpus = [(x86 | {"avx512_f": True, "avx512_bf16": True}, "bfloat16"), (x86, "float32")]
    for cpu, faster in [*cpus, (x86 | {"avx512_f": True}, dtype), ({"neon": True}, dtype)]:
        for size in (10**6, 2 * 10**8):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
            monkeypatch.setattr(model, "num_parameters", lambda size=size: size)
            grm.check_model(model, tokenizer)
            told = re.findall(r"--dtype (\w+)", capsys.readouterr().out)
            wanted = faster != dtype and size > 10**8 and model.device.type == "cpu"
            assert told == [faster] * wanted
