"""How fast is it, and what memory does it take? Alternatives run in turn, and medians are printed.

    python tests/tools/benchmark.py sampling        `sample` beside transformers' ways to sample
    python tests/tools/benchmark.py sampling --old FOLDER      ... and a first edition's sampler
    python tests/tools/benchmark.py sampling --dtypes          ... bfloat16 and nf4, too
    python tests/tools/benchmark.py sampling --gemma FOLDER --llama FILE     ... and llama.cpp
    python tests/tools/benchmark.py training        a GRPO step and its memory
    python tests/tools/benchmark.py scale           a random Gemma-2-27B in 4 bits on one GPU;
                                                    without a GPU, only its memory plan
    python tests/tools/benchmark.py scale --model google/gemma-3-12b-it      only a model's plan
    python tests/tools/benchmark.py all             all of these

--gemma FOLDER takes a converted Gemma 3 270M (see convert_gguf.py), not the embedded judge.
"""

import argparse
import copy
import ctypes
import gc
import importlib.util
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from conftest import JUDGE, load_script  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "0"  # conftest keeps tests off the network
grm = load_script("01_pointwise_grm")
CUDA = torch.cuda.is_available()
SHOTS = JUDGE.parent / "shots.jsonl"
GB = 1e9


def machine() -> str:
    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, torch {torch.__version__}, transformers {grm.transformers.__version__}"


def settings(**more) -> SimpleNamespace:
    """The options that the scripts' functions read, and more."""
    return SimpleNamespace(**{"shots": False, "seed": 0, "beta": 0.08, "lr": 1e-6, **more})


def subject(args):
    """Model, tokenizer and items to measure on."""
    model, tokenizer = grm.load_model(args.gemma or str(JUDGE))
    items = grm.read_lines(JUDGE.parent / "eval.jsonl")
    return model, tokenizer, [item for item in items if len(item.responses) > 1]


def count(rows: list, ends: list[int]) -> int:
    """Tokens up to the first end token, after which `generate` pads. rows: lists of token ids; the
    first edition's sampler gives for each prompt the list of its samples."""
    if hasattr(rows[0][0], "ids"):
        rows = [one.ids for samples in rows for one in samples]
    over = [[i for i, token in enumerate(row, 1) if token in ends] or [len(row)] for row in rows]
    return sum(places[0] for places in over)


def generate(model, prompts, n, length, ends, **options) -> list[list[int]]:
    """transformers' way: one left-padded batch, each prompt repeated n times."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = (torch.tensor(x, device=model.device) for x in (ids, mask))
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": ends[0]}
    how |= {"max_new_tokens": length, "num_return_sequences": n, "eos_token_id": ends, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **how)[:, width:].tolist()


def generate_batch(model, prompts, n, length, ends) -> list[list[int]]:
    """transformers' continuous batching, which knows no n: each prompt n times."""
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": ends[0]}
    how = grm.transformers.GenerationConfig(max_new_tokens=length, eos_token_id=ends, **how)
    inputs = [prompt for prompt in prompts for _ in range(n)]
    found = model.generate_batch(inputs=inputs, generation_config=how, progress_bar=False)
    return [list(output.generated_tokens) for output in found.values()]


def llama_cpp(file: str, tokenizer, prompts, n, length):
    """A function that samples with llama.cpp, a slot for each completion. It reads a GGUF file. A
    request shares a prompt among its n completions. An empty line ends one, as for a base model.
    Its usage counts one of the n only, so that their texts are tokenized again to be counted."""
    try:
        import xllamacpp
    except ImportError:
        sys.exit("error: --llama needs llama.cpp: pip install xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_parallel, options.kv_unified = file, n * len(prompts), True
    options.n_ctx = n * sum(len(prompt) + length for prompt in prompts)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    options.verbosity = 0
    server = xllamacpp.Server(options)
    request = {"n_predict": length, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    request |= {"n_cmpl": n, "stop": ["\n\n"], "cache_prompt": False}

    def draw():
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = [request | {"prompt": prompt} for prompt in prompts]
            answers = list(pool.map(server.handle_completions, asked))
        texts = [choice["text"] for answer in answers for choice in answer["choices"]]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    return draw


def first_edition(folder: str):
    """The module of another checkout's step 1, whose `sample` has the first edition's arguments."""
    path = Path(folder) / "01_pointwise_grm.py"
    spec = importlib.util.spec_from_file_location("first_edition", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(ways: dict, repeats: int, ends: list[int], patience: float = 120) -> dict[str, float]:
    """Run each of `ways` (name -> function that samples) in turn; print and return medians of
    tokens a second. What takes longer than `patience` seconds runs once."""
    speeds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in list(ways.items()):
            start = time.perf_counter()
            try:
                rows = way()
            except Exception as error:  # an alternative that does not run here is not measured
                print(f"  {name:<24} does not run here: {str(error).strip().splitlines()[:1]}")
                del ways[name]
                continue
            seconds = time.perf_counter() - start
            if repeat or seconds > patience:  # the first round warms up
                speeds[name].append(count(rows, ends) / seconds)
            if seconds > patience:
                del ways[name]
    medians = {name: statistics.median(values) for name, values in speeds.items() if values}
    for name, median in medians.items():
        first, ratio, of = next(iter(medians)), next(iter(medians.values())) / median, speeds[name]
        print(f"  {name:<24}{median:8,.0f} tokens/s ({min(of):,.0f} to {max(of):,.0f});", end="")
        print(f" {first} is {ratio:.2f} times as fast")
    return medians


def sampling(args) -> dict[str, float]:
    model, tokenizer, items = subject(args)
    few, n, length = (4, 8, 64) if args.gemma else (args.prompts, 8, 256)
    asked = [grm.show(item, 0, list(range(len(item.responses)))) for item in items[:few]]
    prompts = [grm.encode(tokenizer, one, args.gemma and SHOTS) for one in asked]
    ends = grm.end_tokens(model, tokenizer)
    model.generation_config.eos_token_id = ends  # the same for all ways
    options = settings(max_new_tokens=length)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    seeds = itertools.count()  # each round draws others: where samples end decides on the speed
    ways, models = {}, {}
    if args.dtypes:
        models = {"bfloat16": ("none", "bfloat16"), "nf4": ("nf4", "float32")}
        load = partial(grm.load_model, args.gemma or str(JUDGE))
        models = {name: load(*how)[0] for name, how in models.items()}
    for name, of in [*models.items(), ("float32", model)]:
        of.generation_config.eos_token_id = ends
        draw = partial(grm.sample, of, tokenizer, repeated, 1.0, options)
        name = f"sample, {name}" if models else "sample"
        ways[name] = lambda draw=draw: draw(next(seeds))
    if args.old:
        old, ask = first_edition(args.old), (model, tokenizer, prompts, n, 1.0, length)
        again = {"progress": False}
        ways["first edition"] = lambda ask=ask: old.sample(*ask, seed=next(seeds), **again)
    ask = model, prompts, n, length, ends
    static = {"cache_implementation": "static", "disable_compile": not CUDA}
    if not args.only_old:
        ways["generate"] = lambda: generate(*ask)
        if args.dtypes:
            ways["generate, bfloat16"] = lambda: generate(models["bfloat16"], *ask[1:])
        ways["generate, static cache"] = lambda: generate(*ask, **static)
        ways["generate_batch"] = lambda: generate_batch(*ask)
    if args.llama:
        name = "llama.cpp, " + Path(args.llama).stem
        ways[name] = llama_cpp(args.llama, tokenizer, prompts, n, length)
    print(f"{args.gemma or 'embedded judge'}: {few} prompts, at most {len(max(prompts, key=len))}")
    print(f"tokens, {n} samples of {length} or less; {machine()}; {args.repeats} rounds:")
    return compare(ways, args.repeats, ends)


def peak_memory(reset: bool = False) -> int:
    """The highest memory since the last reset, in bytes: CUDA's, else this process's (Linux)."""
    gc.collect()
    if CUDA:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:  # give back what is free, and lower the kernel's mark
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def timed(run) -> tuple:
    """(what run() returns, seconds, GB that memory rises by)."""
    before, start = peak_memory(reset=True), time.perf_counter()
    result = run()
    if CUDA:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, (peak_memory() - before) / GB


def copy_of(model):
    """The reference of step 3: a frozen copy that shares the weights that are not trained."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def optimizer_of(model):
    """A function that takes a step as train() of the scripts does."""
    weights = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(weights, 1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    if model.device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def update(log):
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()

    return update


def training(args) -> None:
    step = load_script("03_grpo")
    model, tokenizer, items = subject(args)
    few, size, length = (2, 4, 32) if args.gemma else (8, 8, 128)
    options = settings(prompts=few, group_size=size, max_new_tokens=length, lora_r=0)
    options.shots = args.gemma and SHOTS
    step.set_trainable(model, options)
    reference = copy_of(model)
    update_by, rows = optimizer_of(model), []
    for number in range(args.repeats + 1):
        ask = model, tokenizer, items, options, number
        groups, rollout, _ = timed(lambda ask=ask: step.roll_out(*ask))
        ask = model, reference, groups, {}, options
        _, update, rise = timed(lambda ask=ask: update_by(step.learn(*ask)))
        rows.append((rollout, update, rise))
    rollout, update, rise = (statistics.median(column) for column in zip(*rows[1:]))
    print(f"a GRPO step of all weights of {args.gemma or 'the embedded judge'}: {few} prompts,")
    print(f"{size} samples of at most {length} tokens; {machine()}; {args.repeats} steps:")
    print(f"  rollout {rollout:.2f} s, update {update:.2f} s; the update adds {rise:.2f} GB")


def memory_plan(config, quantize, columns=0, samples=0, r=16, dtype=torch.bfloat16) -> dict:
    """What a model of this configuration takes, in bytes; no weight is loaded or made.

    columns: of the cache in all rows (the prompts' and the samples'); samples: drawn at a time;
    r: rank of the adapters on all linear layers, 0 trains all weights. Training is in float32.
    """
    with torch.device("meta"):  # tensors with a shape and no content
        model = grm.transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    head, text = model.get_output_embeddings(), config.get_text_config()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inside = sum(layer.weight.numel() for layer in linear)
    total = sum(parameter.numel() for parameter in model.parameters())
    adapters = r * sum(layer.in_features + layer.out_features for layer in linear)
    # nf4 scales 64 weights by a byte, 256 of these bytes by a float; int8 has a float an output
    packed = {"none": inside * dtype.itemsize, "nf4": inside // 2 + inside // 64 + inside // 4096}
    packed["int8"] = inside + 4 * sum(layer.out_features for layer in linear)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = 2 * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * size
    trained = adapters or total
    return {
        "weights": packed[quantize] + (total - inside) * dtype.itemsize,
        "cache": columns * numbers * text.num_hidden_layers * dtype.itemsize,
        "logits": 16 * samples * text.vocab_size,  # what drawing a token holds
        "adapters": 4 * adapters,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }


def print_plan(plan: dict[str, int]) -> None:
    for name, size in plan.items():
        print(f"  {name:<12}{size / GB:9.3g} GB")
    sampling = sum(plan[name] for name in ("weights", "cache", "logits"))
    training = sum(plan[name] for name in ("weights", "adapters", "gradients", "optimizer"))
    print(f"  sampling {sampling / GB:.3g} GB; training {training / GB:.3g} GB and activations")


WORDS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
WORDS = f"{WORDS} num_key_value_heads head_dim query_pre_attn_scalar".split()
SIZES = {  # of the model; prompts, samples of each, tokens of a prompt and of a sample
    "27b": (dict(zip(WORDS, (256000, 4608, 36864, 46, 32, 16, 128, 144))), 8, 8, 1024, 256),
    "tiny": (dict(zip(WORDS, (2048, 128, 256, 2, 4, 2, 32, 32))), 2, 4, 64, 16),
}


def random_model(config, dtype, device):
    """A model of random weights, its layers made in NF4 one by one: it never exists in 16 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        model = grm.transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    how = {"bias": False, "compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            new = Linear4bit(layer.in_features, layer.out_features, **how)
            weight = 0.02 * torch.randn(layer.weight.shape, dtype=dtype, device=device)
            of = {"requires_grad": False, "quant_type": "nf4", "module": new}
            new.weight = Params4bit(weight, compress_statistics=True, **of).to(device)
            new.support_avx512bf16_for_cpu = False  # as in load_model
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # embeddings; norms, whose weight is what is added to 1
            value = 0.02 * torch.randn(parameter.shape, dtype=dtype, device=device)
            value = torch.nn.Parameter(value * (parameter.dim() > 1), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, value)
    with torch.device(device):  # buffers hold numbers that are worked out
        model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    model.is_quantized = model.is_loaded_in_4bit = True
    return model.eval()


def scale(args) -> None:
    sizes, few, n, width, new = SIZES[args.size]
    config, device = grm.transformers.Gemma2Config(**sizes), "cuda" if CUDA else "cpu"
    if args.model:
        config = grm.transformers.AutoConfig.from_pretrained(args.model)
    print(f"{args.model or f'random Gemma 2, {args.size}'}, {args.quantize}, {machine()}")
    print(f"{few} prompts of {width} tokens with {n} samples of {new} each; LoRA of rank 16")
    print_plan(memory_plan(config, args.quantize, few * (width + n * new), few * n))
    if args.model or (args.size != "tiny" and not CUDA):
        return print("nothing was run: that takes --size tiny, or a GPU and no --model")
    step, dtype = load_script("03_grpo"), torch.bfloat16 if CUDA else torch.float32
    model, seconds, rise = timed(lambda: random_model(config, dtype, device))
    print(f"made in {seconds:.1f} s: {rise:.3g} GB")
    prompts = torch.randint(1, config.vocab_size, (few, width)).tolist()
    options = settings(max_new_tokens=new, lora_r=16)
    tokenizer = grm.transformers.AutoTokenizer.from_pretrained(
        JUDGE
    )  # it is only asked for an end token
    ask = model, tokenizer, [prompt for prompt in prompts for _ in range(n)], 1.0, options
    step.sample(*ask)  # warms up
    drawn, seconds, rise = timed(lambda: step.sample(*ask))
    tokens = sum(map(len, drawn))
    print(f"sampling: {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {rise:.3g} GB more")
    step.set_trainable(model, options)
    reference, groups = copy_of(model), []
    for number, prompt in enumerate(prompts):
        ids, advantages = drawn[number * n :][:n], [(-1.0) ** i for i in range(n)]
        known = {"prompt": prompt, "completion": sum(ids, []), "outputs": ids}
        known |= {"advantages": advantages, "rewards": advantages}
        groups.append(step.Group(*map(known.get, step.Group._fields)))
    update_by = optimizer_of(model)
    for _ in range(2):  # the first one makes the optimizer's state
        log, seconds, rise = timed(lambda: step.learn(model, reference, groups, {}, options))
        update_by(log)
    print(f"an update on them: {seconds:.1f} s, {rise:.3g} GB more, entropy {log['entropy']:.3g}")


def everything(args) -> None:
    """Each benchmark in a process of its own: one that fails stops no other."""
    runs = [["sampling"], ["training"], ["scale", "--size", args.size]]
    if args.gemma:
        runs += [["sampling", "--gemma", args.gemma], ["training", "--gemma", args.gemma]]
    commands = [[__file__, *of, "--repeats", str(args.repeats)] for of in runs]
    failed = 0
    for command in commands:
        print(f"\n$ python {' '.join(command)}", flush=True)
        failed += subprocess.run([sys.executable, *command]).returncode != 0
    sys.exit(f"{failed} of {len(commands)} failed" if failed else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ways = {"sampling": sampling, "training": training, "scale": scale, "all": everything}
    option = parser.add_argument
    option("what", choices=ways)
    option("--gemma", metavar="FOLDER", help="a converted Gemma 3 270M, not the embedded judge")
    option("--old", metavar="FOLDER", help="sampling: a checkout of the first edition")
    option("--only-old", action="store_true", help="sampling: leave out transformers' ways")
    option("--dtypes", action="store_true", help="sampling: also in bfloat16 and nf4")
    option("--llama", metavar="FILE", help="sampling: also by llama.cpp, from a GGUF file")
    option("--prompts", type=int, default=64, help="sampling: prompts for the embedded judge")
    option("--size", choices=SIZES, default="27b", help="scale: of the random model")
    option("--model", help="scale: only the plan of this folder or Hub name")
    option("--quantize", choices=grm.BITS, default="nf4", help="scale: of the plan")
    option("--repeats", type=int, default=3, help="rounds after one that warms up")
    args = parser.parse_args()
    ways[args.what](args)


if __name__ == "__main__":
    main()
