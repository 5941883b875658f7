"""Peak memory of token log-probabilities at Gemma's vocabulary: in chunks with recomputation (step 2) against the plain way. A benchmark, not a test.

    python tests/benchmark_memory.py                     4 sequences of 512 tokens, Gemma 3 270M's width and vocabulary, value and gradient

Each way runs in a process of its own, which says by how much its peak rose above what it held before: the resident set on the CPU (the
kernel's high-water mark), the allocator's peak on CUDA.
"""
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from conftest import load_script


def measure(way: str, tokens: int, width: int, vocabulary: int) -> None:
    rft = load_script("02_rejective_ft")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device).requires_grad_(False)
    config = SimpleNamespace(vocab_size=vocabulary)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), get_output_embeddings=lambda: head)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def peak():
        return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    before, start = peak(), time.time()
    if way == "chunks":
        log_probs = rft.token_log_probs(model, hidden, targets)
    else:
        log_probs = torch.log_softmax(head(hidden).float(), -1).gather(-1, targets[:, None])[:, 0]
    log_probs.sum().backward()
    print(peak() - before, time.time() - start, log_probs.mean().item(), hidden.grad.norm().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--way", choices=["chunks", "plain"], help="measure this one, in this process")
    parser.add_argument("--tokens", type=int, default=4 * 512)
    parser.add_argument("--width", type=int, default=640, help="of the hidden states")
    parser.add_argument("--vocabulary", type=int, default=262144)
    args = parser.parse_args()
    if args.way:
        return measure(args.way, args.tokens, args.width, args.vocabulary)
    peaks = {}
    for way in ("chunks", "plain"):
        command = [sys.executable, __file__, "--way", way, "--tokens", args.tokens, "--width", args.width, "--vocabulary", args.vocabulary]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f'killed ({done.returncode}): out of memory?'}")
        peaks[way], seconds, value, gradient = map(float, done.stdout.split())
        print(f"{way:<8}{peaks[way]:10,.0f} MiB {seconds:8.1f} s   mean log-probability {value:.5f}, norm of the gradient {gradient:.5f}")
    print(f"plain / chunks: {peaks['plain'] / peaks['chunks']:.1f} x the memory")


if __name__ == "__main__":
    main()
