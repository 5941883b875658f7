"""The sampler against transformers' `generate`, token for token, and against probabilities."""

import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import load_script
from peft import LoraConfig

grm = load_script("01_pointwise_grm")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "Gemma2": {"head_dim": 8, **SLIDING},
    "Gemma3Text": {"head_dim": 8, **SLIDING},
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 8},
    "Phi3": {},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {},
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}


class Letters:
    """A stand-in for a tokenizer: token i is character i + 64, and 2 ends."""

    eos_token_id, chat_template = 2, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5] * len(text)}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(64 + i) for i in ids if not (skip_special_tokens and i == 2))


def random_model(family="Llama", **changes):
    """A small random model, whose weights are large enough for varied output."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")
    config = config(**SHAPE | FAMILIES[family] | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


def draw(model, prompts, n=1, temperature=0.0, length=30, seed=0):
    """n completions of every prompt."""
    args = SimpleNamespace(max_new_tokens=length)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    drawn = grm.sample(model, Letters(), repeated, temperature, args, seed)
    return [drawn[i : i + n] for i in range(0, len(drawn), n)]


def generate(model, prompt, length=30):
    ids = torch.tensor([prompt], device=DEVICE)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length}
    return model.generate(ids, do_sample=False, pad_token_id=0, **more)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family, monkeypatch):
    """Padded and alone, beyond the window, with equal prompts, where rows end at different times."""
    model = random_model(family)
    prompts = random_prompts(3, 30, 11, 30, 1)
    model.generation_config.eos_token_id = [2, generate(model, prompts[1])[9]]
    expected = [generate(model, prompt) for prompt in prompts]
    assert len({*map(tuple, expected)}) >= 4 and len({*map(len, expected)}) > 1
    assert draw(model, prompts + prompts[:2], 2) == [[ids] * 2 for ids in expected + expected[:2]]
    assert draw(model, prompts[2:3]) == [expected[2:3]]
    assert draw(model, prompts[4:]) == [expected[4:]]  # one token
    monkeypatch.setattr(grm, "BATCH", 24)
    many = grm.GROUP + 3
    assert draw(model, prompts[:3], many) == [[ids] * many for ids in expected[:3]]


def test_sampling_follows_the_model_s_probabilities():
    model, prompt, temperature = random_model(vocab_size=13, initializer_range=0.2), [5, 9, 4], 0.7
    chances = {}

    def next_token(ids):
        logits = model(torch.tensor([ids], device=DEVICE)).logits[0, -1].double() / temperature
        return enumerate(logits.softmax(-1).tolist())

    for first, chance in next_token(prompt):
        for second, more in next_token([*prompt, first]):
            ids = (first,) if first == 2 else (first, second)  # 2 ends
            chances[ids] = chances.get(ids, 0) + chance * more
    [drawn] = draw(model, [prompt], 4000, temperature, 2)
    counts = Counter(map(tuple, drawn))
    assert counts.keys() <= chances.keys()
    common = [ids for ids in chances if 4000 * chances[ids] >= 5]
    cells = [(counts[ids], 4000 * chances[ids]) for ids in common]
    cells.append((4000 - sum(cell[0] for cell in cells), 4000 - sum(cell[1] for cell in cells)))
    distance = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 20 and abs(distance - freedom) < 5 * (2 * freedom) ** 0.5
    assert draw(model, [prompt], 9, 1.0) == draw(model, [prompt], 9, 1.0)
    assert draw(model, [prompt], 9, 1.0) != draw(model, [prompt], 9, 1.0, seed=1)


def test_out_of_memory_halves_the_batch_and_leaves_nothing_behind(monkeypatch):
    model, prompts, sizes, held = random_model(), random_prompts(*range(3, 12)), [], []
    expected, living = draw(model, prompts, 2), weakref.WeakSet()

    class Small(grm.Batch):
        def __init__(self, model, rows, *more):
            sizes.append(len(rows))
            held.append(len(living))
            if len(rows) > limit:
                raise torch.OutOfMemoryError
            super().__init__(model, rows, *more)
            living.add(self)

    monkeypatch.setattr(grm, "Batch", Small)
    limit = 4
    assert draw(model, prompts, 2) == expected
    assert sizes == [9, 4, 4, 1], "the next batch is not half of the one that was too large"
    assert not any(held), "the memory of a batch is still held while the next one is made"
    limit = 0
    with pytest.raises(grm.UserError, match="memory"):
        draw(model, prompts, 2)


def test_what_is_too_long_is_left_out():
    model = random_model(max_position_embeddings=64)
    prompts = random_prompts(3, 35, 34, 90)
    expected = [[generate(model, prompts[0])], [[]], [generate(model, prompts[2])], [[]]]
    assert draw(model, prompts) == expected
    assert draw(model, prompts[3:], 2) == [[[], []]]


def test_a_long_prompt_changes_nothing_for_a_short_one_with_longrope():
    rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    model = random_model("Phi3", max_position_embeddings=512, **rope)
    short, long = random_prompts(20, 100)
    assert draw(model, [short, long]) == [[generate(model, short)], [[]]]


ROWS = [([5, 6, 7, 8], [0, 1, 2]), ([9, 8], [3, 4])]


def tensors(batch) -> dict:
    """Address and shape of all that a step reads or writes."""
    found = {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
    for number, layer in enumerate(batch.cache.layers):
        found |= {f"{number} {name}": getattr(layer, name) for name in ("keys", "values")}
    return {name: (tensor.data_ptr(), tensor.shape) for name, tensor in found.items()}


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text", "Mistral", "Qwen3"])
@pytest.mark.parametrize("temperature, adapters", [(0.0, False), (0.7, False), (0.7, True)])
def test_steps_can_be_recorded(family, temperature, adapters):
    """Between two looks a CUDA graph holds on to addresses and shapes, and no step waits for the
    device: on the meta device there are no values, and whatever asks for one raises."""
    for device in ("cpu", "meta"):
        model = random_model(family)
        if adapters:  # in float32, as they are trained, on a model in bfloat16
            model.to(torch.bfloat16).add_adapter(LoraConfig(r=2, target_modules="all-linear"))
            for name, weight in model.named_parameters():
                weight.data = weight.data.float() if "lora_" in name else weight.data
        batch = grm.Batch(model.to(device), ROWS, temperature)
        for rows, members in (([0, 1], [[0, 1], [1, 2]]), ([1], [[1]])):
            kept = [torch.tensor(numbers, device=device) for numbers in (rows, members)]
            batch.keep(*kept, 4)
            batch.advance()
            batch.tokens[0, :, -3 * batch.n :] = 0
            before, tokens = tensors(batch), batch.tokens.clone()
            for _ in range(3):
                batch.advance()
            assert tensors(batch) == before and len(before) > 8
            assert device == "meta" or not batch.tokens.equal(tokens)
        assert batch.tokens.shape == (3, 1, 3 + 2 * 4 + 5)


def test_reading_prompts_makes_no_logits():
    """They are not needed, and torch's bfloat16 on a CPU copied Gemma's head for each of 54 rows."""
    model, seen = random_model(), []
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].shape))
    batch = grm.Batch(model, ROWS, 0.0)
    assert not seen
    batch.keep(torch.arange(2), torch.tensor([[0, 1], [0, 1]]), 1)
    batch.advance()
    assert [tuple(shape) for shape in seen] == [(2, 2, 61)]


def test_a_batch_gives_back_the_places_that_it_was_given():
    batch = grm.Batch(random_model(), [([5, 6, 7], [3, 1, 4]), ([9, 8], [0])], 1.0)
    drawn = batch.finish(24, list(range(3, 20)))
    assert sorted(drawn) == [0, 1, 3, 4] and all(0 < len(ids) <= 24 for ids in drawn.values())
