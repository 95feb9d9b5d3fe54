"""The one-machine model against transformers, and its HF folders."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from slime_local import prefixes
from slime_local.attention import attend_causal
from slime_local.errors import UsageError
from slime_local.hf_folder import check_hf_folder, load_config
from slime_local.kept_attention import KeptAttention
from slime_local.model import load_model, save_hf
from slime_local.prefixes import decode_plan, share_prefixes

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # transformers initialises them to 1 and 0
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "hf"


def test_hidden_states_and_gradients_equal_those_of_transformers(folder):
    ours = load_model(folder, torch.float32, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 300, (40,))
    packed = ours.logits(ours(ids, [25, 15]))
    apart = torch.cat([theirs(ids[None, :25]).logits[0], theirs(ids[None, 25:]).logits[0]])
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-4)
    packed.logsumexp(-1).sum().backward()
    apart.logsumexp(-1).sum().backward()
    ours_grad = ours.embedding.word_embeddings.weight.grad
    torch.testing.assert_close(ours_grad, theirs.model.embed_tokens.weight.grad, atol=1e-3, rtol=1e-3)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6))
def test_shared_prefixes_lose_nothing(sequences):
    lengths = [len(s) for s in sequences]
    packed = torch.tensor([t for s in sequences for t in s])
    shared = share_prefixes(packed, lengths)
    gather = torch.arange(len(packed)) if shared.gather is None else shared.gather
    assert torch.equal(shared.tokens[gather], packed)
    assert torch.equal(shared.positions[gather], torch.cat([torch.arange(n) for n in lengths]))
    assert len(shared.tokens) == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})
    for path in shared.paths:
        read = torch.cat([shared.positions[span] for span in path])
        assert torch.equal(read, torch.arange(len(read)))


def test_shared_prefixes_change_neither_hidden_states_nor_gradients(folder):
    model = load_model(folder, torch.float32, "cpu")
    a, b = torch.randint(0, 300, (20,)), torch.randint(0, 300, (15,))
    sequences = [torch.cat([a, b]), a, torch.cat([a, b[:5], a]), b]
    weight = model.decoder.layers[0].mlp.linear_fc2.weight
    together = model(torch.cat(sequences), [len(s) for s in sequences])
    together.square().mean().backward()
    shared_grad, weight.grad = weight.grad, None
    apart = torch.cat([model(s, [len(s)]) for s in sequences])
    apart.square().mean().backward()
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_grad, weight.grad, atol=1e-6, rtol=1e-4)


def test_saved_folder_is_the_same_model_for_transformers(folder, tmp_path):
    ours = load_model(folder, torch.float32, "cpu")
    save_hf(ours, tmp_path / "out", folder)
    save_hf(ours, tmp_path / "out", folder)  # over an older one
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_names_are_megatrons(folder):
    names = {name for name, _ in load_model(folder, torch.float32, "cpu").named_parameters()}
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in names
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert "embedding.word_embeddings.weight" in names


def test_frozen_lower_layers_are_left_out_of_autograd(folder):
    model = load_model(folder, torch.float32, "cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("decoder.layers.2."))
    model(torch.arange(20), [20]).sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, p in model.named_parameters() if p.requires_grad}


def test_bf16_compute_keeps_fp32_parameters_and_sees_new_weights(folder):
    model = load_model(folder, torch.bfloat16, "cpu")
    ids = torch.arange(30)
    with torch.no_grad():
        before = model.logits(model(ids, [30]))
        for parameter in model.parameters():
            assert parameter.dtype == torch.float32
            parameter.mul_(1.2)
        model.weights_changed()
        after = model.logits(model(ids, [30]))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (33, 33), (200, 200), (128, 300), (150, 151), (1, 40)])
def test_block_attention_equals_the_fused_one_with_its_gradients(n, m):
    q, k, v = torch.randn(n, 2, 3, 8), torch.randn(m, 2, 8), torch.randn(m, 2, 8)
    weight = torch.randn(n, 48)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    blocks = attend_causal(*leaves)
    (blocks * weight).sum().backward()
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    plain = [x.double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("nkgd,mkd->kgnm", plain[0], plain[1]) * 8**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = torch.einsum("kgnm,mkd->nkgd", weights, plain[2]).reshape(n, -1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(blocks.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attend_causal(q, k, v).double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UsageError, match="convert_torch_dist_to_hf"):
        check_hf_folder(folder)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"model_type": "gpt2"}, 'model type "gpt2" is not one of llama, qwen2, qwen3'),
        ({"model_type": None}, "model type null is not one of"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported (only "silu")'),
        ({"attention_bias": True}, "attention_bias true is not supported (only false)"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "only the type 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "only the type 'default'"),
        ({"hidden_size": "64"}, 'hidden_size "64": not a number above 0'),
        ({"num_hidden_layers": None}, "num_hidden_layers null: not a number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3: not a divisor of 4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN: not a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1: neither true nor false"),
        ({"eos_token_id": [2, "x"]}, 'eos_token_id [2, "x"]: neither an id nor ids'),
    ],
)
def test_a_config_of_something_else_is_refused(folder, said, told):
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 4} | said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=re.escape(told)):
        load_config(folder)


@pytest.mark.parametrize("old", [False, True])
def test_a_config_is_read_as_transformers_reads_it(folder, old):
    """Also in the form of older files, whose rope_theta stands by itself."""
    if old:
        config = json.loads((folder / "config.json").read_text())
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
        (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = load_config(folder), AutoConfig.from_pretrained(folder)
    for name, value in dataclasses.asdict(ours).items():
        if name == "rope_theta":
            assert value == theirs.rope_parameters["rope_theta"]
        elif name == "head_dim":
            assert value == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        elif name == "eos_token_id":
            assert set(value) == {theirs.eos_token_id} - {None}
        else:
            assert value == getattr(theirs, name), name


@pytest.mark.parametrize(("ends", "known"), [(None, {2}), (5, {2, 5}), ([2, 5], {2, 5}), ([], {2})])
def test_end_ids_are_those_of_both_files(folder, ends, known):
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    assert set(load_config(folder).eos_token_id) == known
    (folder / "generation_config.json").unlink()
    assert load_config(folder).eos_token_id == (2,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "generation_config.json is not JSON"),
        ("[]", "generation_config.json holds no JSON object"),
        ('{"eos_token_id": "</s>"}', 'generation_config.json says eos_token_id "</s>": neither an id nor ids'),
        ('{"eos_token_id": [true]}', "generation_config.json says eos_token_id [true]: neither an id nor ids"),
    ],
)
def test_a_damaged_generation_config_is_refused(folder, text, told):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)


def test_the_small_models_epsilon_is_the_one_of_its_model_args(smol_dir):
    """slime compares config and flags exactly; the GGUF file says 9.999999747378752e-06."""
    epsilon = json.loads((smol_dir / "config.json").read_text())["rms_norm_eps"]
    assert epsilon == 1e-5


# ---- Decoding over kept keys and values --------------------------------------------------------------------------

# Few different tokens and sequences cut out of few others, so that prefixes are shared in many ways.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=8).map(sorted)


@settings(max_examples=60)
@given(sequences=SEQUENCES, spared=st.sampled_from([1, 3, 100]), group=st.sampled_from([1, 3]))
def test_attention_over_shared_prefixes_is_plain_attention(sequences, spared, group):
    """Whatever is shared, every row attends over all of its positions once, and over nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_SPARED_TOKENS", spared)
        plan = decode_plan(sequences)
    covered = [[] for _ in sequences]
    for segment in plan:
        for row in range(segment.rows.start, segment.rows.stop):
            covered[row] += range(segment.start, segment.end)
    assert covered == [list(range(len(sequence) + 1)) for sequence in sequences]

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 20, 2, 2, 8, generator=generator)  # token, position -> key and value of two heads
    kept = [_kept([table[token, i] for i, token in enumerate(sequence)], room=1) for sequence in sequences]
    q = torch.randn(len(sequences), 2, group, 8, generator=generator)
    new = torch.randn(2, len(sequences), 2, 8, generator=generator)
    found = KeptAttention(kept, [len(s) for s in sequences], [1] * len(sequences), plan)(0, q, *new)
    for row, kv in enumerate(kept):
        torch.testing.assert_close(kv[0, :, :, -1], new[:, row])
        _assert_plain_attention(found[row], q[row][None], kv)


@pytest.mark.parametrize("group", [1, 3])
def test_appended_tokens_see_what_was_kept_and_each_other(group):
    starts, lengths = [7, 0, 300, 31], [1, 5, 20, 2]
    kept = [_kept(torch.randn(start, 2, 2, 8), room=length + 3) for start, length in zip(starts, lengths, strict=True)]
    q, new = torch.randn(28, 2, group, 8), torch.randn(2, 28, 2, 8)
    found = KeptAttention(kept, starts, lengths, decode_plan([[0] * 7]))(0, q, *new)
    row = 0
    for kv, start, length in zip(kept, starts, lengths, strict=True):
        for position in range(start, start + length):
            _assert_plain_attention(found[row], q[row][None], kv[..., : position + 1, :])
            row += 1


def _kept(entries, room):
    """Kept keys and values [1 layer, 2, kv_heads 2, len(entries) + room, 8], `room` of them unwritten."""
    return torch.stack([*entries, *torch.zeros(room, 2, 2, 8)], dim=2)[None]


def _assert_plain_attention(found, q, kv):
    keys, values = kv[0].double()
    scores = torch.einsum("nkgd,kmd->nkgm", q.double(), keys) * 8**-0.5
    expected = torch.einsum("nkgm,kmd->nkgd", scores.softmax(-1), values).flatten()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_of_many_requests_is_read_once():
    system = list(range(100, 400))
    plan = decode_plan(sorted(system + [n] * 50 for n in range(16)))
    assert (plan[0].start, plan[0].end, plan[0].rows) == (0, 300, slice(0, 16))
    assert len(plan) == 17 and all(segment.start == 300 for segment in plan[1:])
