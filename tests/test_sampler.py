"""The sampler against transformers' `generate`, token for token, and against the distribution that it should draw from."""
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig
from transformers import MistralConfig, MistralForCausalLM

from conftest import JUDGE, gemma_270m, load_script

grm = load_script("01_pointwise_grm")


class Letters:
    """A stand-in for a tokenizer: token i is character i + 64; no end token unless given."""
    pad_token_id, chat_template = 0, None

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(64 + i) for i in ids if not (skip_special_tokens and i == self.eos_token_id))


def random_gemma(version, seed=0, eos_token_id=None):
    """A small random Gemma whose sliding window (8) is shorter than the prompts; its weights are large enough for varied output."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, eos_token_id=eos_token_id, pad_token_id=0,
                 bos_token_id=None, initializer_range=0.3)
    if version == 4:  # its last layers look at the keys and values of earlier ones, and full attention has heads of another size
        shape |= dict(global_head_dim=16, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61, initializer_range=0.6)
    config, kind = {2: (Gemma2Config, Gemma2ForCausalLM), 3: (Gemma3TextConfig, Gemma3ForCausalLM), 4: (Gemma4TextConfig, Gemma4ForCausalLM)}[version]
    return kind(config(**shape)).eval()


def random_prompts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


def generate(model, prompts, pad_id, stop_ids, max_new_tokens):
    """Greedy continuations by `generate`, one unpadded prompt at a time, cut after the end token."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
                             pad_token_id=pad_id)[0, len(prompt):].tolist()
        end = next((i + 1 for i, token in enumerate(new) if token in stop_ids), len(new))
        rows.append(new[:end])
    return rows


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_greedy_equals_generate_past_the_sliding_window(version, batch_size):
    model, prompts = random_gemma(version), random_prompts([3, 30, 11, 17, 30, 8, 1])
    expected = generate(model, prompts, 0, [], 40)
    drawn = grm.sample(model, Letters(), prompts, n=2, temperature=0, max_new_tokens=40, batch_size=batch_size, progress=False)
    assert [[s.ids for s in samples] for samples in drawn] == [[ids, ids] for ids in expected]
    assert len({tuple(ids) for ids in expected}) == len(expected)  # the prompts do lead to different texts


def test_greedy_equals_generate_where_all_layers_slide():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                             num_key_value_heads=2, head_dim=8, sliding_window=8, eos_token_id=None, pad_token_id=0,
                                             bos_token_id=None, initializer_range=0.3)).eval()
    prompts = random_prompts([3, 30, 11])
    drawn = grm.sample(model, Letters(), prompts, temperature=0, max_new_tokens=30, progress=False)
    assert [one.ids for [one] in drawn] == generate(model, prompts, 0, [], 30)


def random_deepseek(version):
    """A small random DeepSeek (V2 is what the released 16B judge is made of): its cache holds latents that all heads' keys and values are made of."""
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=None,
                 kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_group=1, topk_group=1, eos_token_id=None, pad_token_id=0,
                 bos_token_id=None, initializer_range=0.3)
    config, kind = {2: (DeepseekV2Config, DeepseekV2ForCausalLM), 3: (DeepseekV3Config, DeepseekV3ForCausalLM)}[version]
    return kind(config(**shape)).eval()


@pytest.mark.parametrize("version", [2, 3])
def test_greedy_equals_generate_where_the_cache_holds_latents(version):
    model, prompts = random_deepseek(version), random_prompts([3, 30, 11, 17, 30])
    expected = generate(model, prompts, 0, [], 40)
    drawn = grm.sample(model, Letters(), prompts, n=2, temperature=0, max_new_tokens=40, batch_size=7, progress=False)
    assert [[s.ids for s in samples] for samples in drawn] == [[ids, ids] for ids in expected]
    assert len({tuple(ids) for ids in expected}) == len(set(map(tuple, prompts)))


@pytest.mark.parametrize("version", [2, 3])
def test_greedy_equals_generate_when_rows_finish_and_leave(version):
    prompts = random_prompts(range(2, 30, 2))
    plain = generate(random_gemma(version), prompts, 0, [], 40)
    stop_ids, ended = [], set()  # end tokens, taken until about half of the rows write one of them
    for token in range(3, 61):
        more = ended | {number for number, row in enumerate(plain) if token in row}
        if len(ended) < len(prompts) // 2 and len(more) < len(prompts) * 3 / 4:
            stop_ids, ended = stop_ids + [token], more
    model = random_gemma(version, eos_token_id=stop_ids)
    expected = generate(model, prompts, 0, stop_ids, 40)
    assert len(prompts) / 4 < sum(row[-1] in stop_ids for row in expected) < len(prompts) * 3 / 4
    drawn = grm.sample(model, Letters(), prompts, n=2, temperature=0, max_new_tokens=40, progress=False)
    assert [[s.ids for s in samples] for samples in drawn] == [[ids, ids] for ids in expected]


def test_greedy_equals_generate_on_the_embedded_judge():
    model, tokenizer = grm.load_model(JUDGE)
    items = grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=12)
    prompts = [grm.encode(tokenizer, grm.build_prompt(p.query, p.responses)) for p in items]
    expected = generate(model, prompts, tokenizer.pad_token_id, [tokenizer.eos_token_id], 200)
    drawn = grm.sample(model, tokenizer, prompts, n=2, temperature=0, max_new_tokens=200, progress=False)
    assert [[s.ids for s in samples] for samples in drawn] == [[ids, ids] for ids in expected]
    assert all(s.ids[-1] == tokenizer.eos_token_id and s.text == tokenizer.decode(s.ids[:-1]) for samples in drawn for s in samples)


@pytest.mark.gemma
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_greedy_equals_generate_on_gemma_3_270m(quantize):
    model, tokenizer = grm.load_model(gemma_270m(), quantize)
    texts = ("The capital of France is", "One, two, three,", "Once upon a time, in a land far away, there")
    prompts = [grm.encode(tokenizer, text) for text in texts]
    expected = generate(model, prompts, 0, [tokenizer.eos_token_id], 24)
    drawn = grm.sample(model, tokenizer, prompts, n=2, temperature=0, max_new_tokens=24, progress=False)
    assert [[s.ids for s in samples] for samples in drawn] == [[ids, ids] for ids in expected]


def draws_with_fake_graphs(monkeypatch, capture, **arguments):
    """Samples on this machine as if a step could be captured: `capture` takes the place of ours."""
    begin = grm.Decoder.__init__

    def begin_with_graphs(self, model, *rest):
        begin(self, model, *rest)
        self.graphs, self.pool = not getattr(model, "no_graphs", False), None

    monkeypatch.setattr(grm.Decoder, "__init__", begin_with_graphs)
    monkeypatch.setattr(grm, "capture", capture)
    return [[s.ids for s in samples] for samples in grm.sample(**arguments)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_step_reads_and_writes_fixed_addresses_and_is_captured_once_for_each_shape(monkeypatch, temperature):
    model, prompts, shapes = random_gemma(3, eos_token_id=list(range(3, 61, 6))), random_prompts([3, 30, 11, 17, 30, 8, 1]), []

    def capture(step, pool):
        decoder = step.__self__

        def state():  # all that a graph would hold on to, by address and shape, and what Python would have decided
            tensors = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
            tensors += [tensor for cache in (decoder.cache, decoder.prompt_cache) for pair in cache.values() for tensor in pair]
            return [(tensor.data_ptr(), tensor.shape) for tensor in tensors], decoder.visible

        at_capture, _ = state(), shapes.append((len(decoder.token), decoder.visible))

        def replay():
            assert state() == at_capture
            step()
            assert state() == at_capture
        return replay

    ask = dict(model=model, tokenizer=Letters(), prompts=prompts, n=3, temperature=temperature, max_new_tokens=150, progress=False)
    expected = [[s.ids for s in samples] for samples in grm.sample(**ask)]
    assert draws_with_fake_graphs(monkeypatch, capture, **ask) == expected
    assert len(shapes) == len(set(shapes)) > 3 and len({rows for rows, _ in shapes}) > 1 < len({visible for _, visible in shapes})


def test_a_step_that_cannot_be_captured_is_taken_without_and_not_tried_again(monkeypatch, capsys):
    tries = []

    def capture(step, pool):
        tries.append(step)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")

    ask = dict(model=random_gemma(3), tokenizer=Letters(), prompts=random_prompts([5, 9]), n=2, max_new_tokens=20, progress=False)
    expected = [[s.ids for s in samples] for samples in grm.sample(**ask)]
    assert [draws_with_fake_graphs(monkeypatch, capture, **ask) for _ in "12"] == [expected] * 2
    assert len(tries) == 1
    assert capsys.readouterr().out == ("sampling goes on without CUDA graphs, more slowly: a step cannot be captured "
                                       "(CUDA error: operation not permitted when stream is capturing)\n")


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_greedy_is_the_same_with_and_without_cuda_graphs(monkeypatch, quantize):
    model, tokenizer = grm.load_model(JUDGE, quantize)
    items = grm.load_preferences(JUDGE.parent / "eval.jsonl", limit=12)
    prompts, captured, capture = [grm.encode(tokenizer, grm.build_prompt(p.query, p.responses)) for p in items], [], grm.capture
    monkeypatch.setattr(grm, "capture", lambda step, pool: captured.append(pool) or capture(step, pool))
    drawn = []
    for model.no_graphs in (False, True):
        drawn.append([s.ids for [s] in grm.sample(model, tokenizer, prompts, temperature=0, max_new_tokens=200, progress=False)])
        assert captured and model.no_graphs == (len(drawn) == 2)  # captured, and nothing failed
    assert drawn[0] == drawn[1]


def test_rows_of_one_prompt_share_its_keys_and_leave_one_by_one():
    model = random_gemma(3)
    prompts, rows = [tuple(prompt) for prompt in random_prompts([4, 9, 6])], [0, 0, 0, 0, 0, 1, 2]
    decoder = grm.Decoder(model, prompts, rows, 0, 8, [], 0, torch.Generator().manual_seed(0))
    # 7 rows of 3 prompts: 3 rows a group, and the first prompt makes two
    assert decoder.table.tolist() == [[0, 1, 2], [3, 4, 3], [5, 5, 5], [6, 6, 6]] and decoder.slots.tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert {tensor.shape for pair in decoder.prompt_cache.values() for tensor in pair} == {(4, 2, 9, 8)}
    assert {tensor.shape for pair in decoder.cache.values() for tensor in pair} == {(7, 2, 8, 8)}
    decoder.visible = 8
    decoder.keep([1, 4, 6])
    assert decoder.table.tolist() == [[0], [1], [2]] and decoder.slots.tolist() == [0, 1, 2]
    assert {len(tensor) for cache in (decoder.cache, decoder.prompt_cache) for pair in cache.values() for tensor in pair} == {3}
    for _ in range(7):
        with torch.no_grad():
            decoder.step()
    expected = generate(model, [list(prompts[0]), list(prompts[2])], 0, [], 8)
    assert decoder.output.tolist() == [expected[0], expected[0], expected[1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_follow_softmax_of_logits_over_temperature(temperature):
    model, [prompt] = random_gemma(3), random_prompts([7])
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1)
    draws = 20_000
    [samples] = grm.sample(model, Letters(), [prompt], n=draws, temperature=temperature, max_new_tokens=1, batch_size=5000, progress=False)
    share = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=61) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() <= 4.5 * error + 1e-4).all()


def test_the_second_token_is_drawn_given_the_first():
    model, [prompt] = random_gemma(3), random_prompts([7])
    draws = 20_000
    [samples] = grm.sample(model, Letters(), [prompt], n=draws, temperature=1.0, max_new_tokens=2, batch_size=5000, progress=False)
    first = torch.tensor([s.ids[0] for s in samples]).mode().values.item()
    second = torch.tensor([s.ids[1] for s in samples if s.ids[0] == first])
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt + [first]])).logits[0, -1], -1)
    error = (expected * (1 - expected) / len(second)).sqrt()
    assert ((torch.bincount(second, minlength=61) / len(second) - expected).abs() <= 4.5 * error + 1e-4).all()


def test_same_seed_same_samples_other_seed_others():
    model, prompts = random_gemma(3), random_prompts([4, 9])

    def draw(seed):
        return [[s.ids for s in samples] for samples in grm.sample(model, Letters(), prompts, n=3, max_new_tokens=12, seed=seed, progress=False)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(5)[0][0] != draw(5)[0][1]  # and the samples of one prompt differ


def test_equal_prompts_are_prefilled_once(monkeypatch):
    model, prompts = random_gemma(3), random_prompts([6, 9])
    rows = []
    forward = grm.Decoder.forward
    monkeypatch.setattr(grm.Decoder, "forward", lambda self, ids, *rest: rows.append(tuple(ids.shape)) or forward(self, ids, *rest))
    drawn = grm.sample(model, Letters(), [prompts[0], prompts[1], prompts[0]], n=4, max_new_tokens=3, progress=False)
    assert rows[0] == (2, 9) and rows[1:] == [(12, 1)] * 2  # the first token comes from the prefill
    assert [len(samples) for samples in drawn] == [4, 4, 4]


def test_a_chat_model_stops_where_its_template_ends_the_turn():
    class Chat(Letters):
        chat_template, ends = "a template", None

        def apply_chat_template(self, turns, tokenize):
            return "".join(turn["content"] for turn in turns) + chr(64 + self.ends)

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) - 64 for c in text]}

    model, prompts, tokenizer = random_gemma(3), random_prompts([5, 9]), Chat()
    whole = generate(model, prompts, 0, [], 20)
    tokenizer.ends = whole[0][7]  # a token that the model writes, though neither it nor the tokenizer calls it an end
    drawn = grm.sample(model, tokenizer, prompts, temperature=0, max_new_tokens=20, progress=False)
    assert drawn[0][0].ids == whole[0][:whole[0].index(tokenizer.ends) + 1]
    assert drawn[1][0].ids == (whole[1][:whole[1].index(tokenizer.ends) + 1] if tokenizer.ends in whole[1] else whole[1])


def test_an_illegal_memory_access_is_not_a_lack_of_memory(monkeypatch):
    def step(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(grm.Decoder, "step", step)
    with pytest.raises(RuntimeError, match="illegal"):
        grm.sample(random_gemma(3), Letters(), random_prompts([5, 6]), max_new_tokens=20, progress=False)


def test_out_of_memory_halves_the_batch_and_loses_nothing(monkeypatch, capsys):
    model, prompts = random_gemma(3), random_prompts([5, 6, 7, 8, 9, 10, 11, 12])
    expected = generate(model, prompts, 0, [], 20)
    sizes = []
    step = grm.Decoder.step

    def step_in_little_memory(self):
        sizes.append(len(self.output))
        if len(self.output) > 3 and self.column.item() > 4:  # fails in the middle of a batch
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self)

    monkeypatch.setattr(grm.Decoder, "step", step_in_little_memory)
    drawn = grm.sample(model, Letters(), prompts, temperature=0, max_new_tokens=20, batch_size=8)
    assert [samples[0].ids for samples in drawn] == expected
    assert sizes[0] == 8 and set(sizes) == {8, 4, 2}
    assert "going on with 4" in capsys.readouterr().out


def test_not_even_one_row_fits(monkeypatch):
    def step(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(grm.Decoder, "step", step)
    with pytest.raises(grm.ModelError, match="not enough memory for one row of 25 tokens"):
        grm.sample(random_gemma(3), Letters(), random_prompts([5]), max_new_tokens=20, progress=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def step(self):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(grm.Decoder, "step", step)
    with pytest.raises(RuntimeError, match="shapes"):
        grm.sample(random_gemma(3), Letters(), random_prompts([5]), max_new_tokens=20, progress=False)


def test_stop_cuts_the_text_before_it_and_the_row_leaves():
    model, prompts = random_gemma(3), random_prompts([5, 9, 14])
    free = [s[0] for s in grm.sample(model, Letters(), prompts, temperature=0, max_new_tokens=64, progress=False)]
    stop = free[0].text[10:12]
    cut = [s[0] for s in grm.sample(model, Letters(), prompts, temperature=0, max_new_tokens=64, stop=stop, progress=False)]
    assert cut[0].text == free[0].text[:free[0].text.index(stop)]
    for before, after in zip(free, cut):
        assert stop not in after.text and before.text.startswith(after.text)
        assert before.ids[:len(after.ids)] == after.ids


def test_no_prompts_no_samples():
    assert grm.sample(random_gemma(3), Letters(), [], progress=False) == []


def test_rows_that_fit_counts_cache_and_logits(monkeypatch):
    model = random_gemma(3)
    # keys and values: 2 * 4 layers * 2 heads * 8 dims * 100 columns * 4 bytes = 51,200; logits: 16 * 61 = 976
    monkeypatch.setattr(grm.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 52_176 * 10 + 1}))
    assert grm.rows_that_fit(model, 60, 40, 1) == 10
    monkeypatch.setattr(grm.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5}))
    assert grm.rows_that_fit(model, 60, 40, 1) == 1


@pytest.mark.parametrize("version", [2, 3, 4])
def test_bytes_of_a_token_are_those_in_the_cache(version):
    model = random_gemma(version)
    decoder = grm.Decoder(model, [(5, 6, 7)], [0, 0], 0.0, 10, [], 0, torch.Generator())
    held = sum(part.nbytes for layer in decoder.cache.values() for part in layer)
    assert grm.bytes_of_token(model.config, 4) == held / 2 / 10


def test_rows_of_one_prompt_share_it_but_for_latents(monkeypatch):
    monkeypatch.setattr(grm.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 10**6}))
    for model, prompt in (random_gemma(3), 25), (random_deepseek(2), 100):  # what each of four rows of a prompt of 100 tokens takes
        row = (prompt + 20) * grm.bytes_of_token(model.config, 4) + 16 * 61
        assert grm.rows_that_fit(model, 100, 20, 4) == 10**6 // row


def test_a_token_of_latents_counts_them_and_what_one_layer_makes_of_them():
    # (3 layers + 1 copy) * (12 + 4) and, for 4 heads, 8 + 6 from the latent and a key of 8 + 4; 4 bytes each
    assert grm.bytes_of_token(random_deepseek(2).config, 4) == (4 * 16 + 4 * (14 + 12)) * 4
