"""The compiled kernels beside torch: products, the decoder over any step, and what happens without them."""

import contextlib
import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_local import kernels
from slime_local.compiled_decoder import CompiledDecoder, fits
from slime_local.engine import KV_PANEL
from slime_local.hf_folder import FAMILIES, parse_config
from slime_local.kept_attention import KeptAttention
from slime_local.model import Linear, Transformer, rms_norm
from slime_local.prefixes import decode_plan

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv(kernels.SWITCH, raising=False)


@needs_compiler
@settings(max_examples=60)
@given(m=st.integers(0, 40), n_out=st.integers(1, 100), n_in=st.integers(1, 70), bias=st.booleans())
def test_products_are_torchs(m, n_out, n_in, bias):
    x, weight = torch.randn(m, n_in), torch.randn(n_out, n_in)
    added = torch.randn(n_out) if bias else None
    found = kernels.product(x, kernels.panels(weight), n_out, added)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, added), atol=1e-4, rtol=1e-4)


def has_bf16() -> bool:
    return kernels.library() is not None and bool(kernels.library().has_bf16())


needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU multiplies no bf16 vectors")


@needs_bf16
@settings(max_examples=60)
@given(m=st.integers(0, 40), n_out=st.integers(1, 100), n_in=st.integers(1, 70), bias=st.booleans())
def test_products_in_bf16_round_what_goes_in_and_nothing_else(m, n_out, n_in, bias):
    x, weight = torch.randn(m, n_in), torch.randn(n_out, n_in)
    added = torch.randn(n_out) if bias else None
    found = kernels.product(x, kernels.panels(weight, torch.bfloat16), n_out, added)
    expected = torch.nn.functional.linear(x.bfloat16().float(), weight.bfloat16().float(), added)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_bf16
@pytest.mark.parametrize("flags", [(), ("-DWIDEN",)])
def test_bf16_is_the_same_in_pairs_and_widened(monkeypatch, flags):
    """Each CPU uses one way; both are compiled and run here."""
    monkeypatch.setattr(kernels, "_widen", lambda: flags)
    kernels.library.cache_clear()
    try:
        widened = kernels.library().multiplies_bf16() == 0
        assert widened or not flags
        test_products_in_bf16_round_what_goes_in_and_nothing_else()
        test_attention_in_training_is_exact_and_in_bf16_near()
        test_any_step_in_bf16_is_near_torchs()
    finally:
        kernels.library.cache_clear()


@needs_bf16
def test_a_trained_product_in_bf16_is_the_engines_and_its_gradients_are_near():
    """The same bits as without a gradient; gradients within bf16's rounding of the exact ones."""
    layer, x = Linear(96, 64, torch.bfloat16), torch.randn(33, 96, requires_grad=True)
    torch.nn.init.normal_(layer.weight, std=0.2)
    trained = layer(x)
    assert torch.equal(trained.detach(), layer(x.detach().requires_grad_(False)).detach())
    with torch.no_grad():
        assert torch.equal(trained, layer(x))
    direction = torch.randn_like(trained)
    trained.backward(direction)
    for found, expected in ((x.grad, direction @ layer.weight), (layer.weight.grad, direction.t() @ x)):
        assert (found - expected).norm() < 0.01 * expected.norm()


@contextlib.contextmanager
def torch_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_compiler
@settings(max_examples=40)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=2), n=st.integers(1, 70), threads=st.integers(1, 3))
def test_the_norm_and_its_gradients_are_torchs(shape, n, threads):
    x, weight = torch.randn(*shape, n + 5)[..., :n].requires_grad_(), torch.randn(n, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = torch.nn.functional.rms_norm(exact[0], (n,), exact[1], 1e-5)
    grad = torch.randn_like(x)
    with torch_threads(threads):
        found = rms_norm(x, weight, 1e-5)
        found.backward(grad)
    expected.backward(grad.double())
    for mine, theirs in ((found, expected), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)


@needs_compiler
@settings(max_examples=40)
@given(rows=st.integers(0, 20), ffn=st.integers(1, 70), spread=st.sampled_from([1, 200]), threads=st.integers(1, 3))
def test_the_gate_and_its_gradient_are_torchs(rows, ffn, spread, threads):
    gate_up, grad = torch.randn(rows, 2 * ffn) * spread, torch.randn(rows, ffn)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad.double())
    with torch_threads(threads):
        out = kernels.gate(gate_up)
        by_gate_up, again = kernels.gate_backward(gate_up.clone(), grad.clone())
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_gate_up.double(), exact.grad, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_the_norms_gradient_has_the_same_bits_in_every_run():
    x, weight, grad = torch.randn(500, 64), torch.randn(64), torch.randn(500, 64)
    with torch_threads(3):
        first, *others = [kernels.norm_backward(x, weight, grad, 1e-5) for _ in range(6)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def reference_attention(q, k, v):
    """(out, log-sum-exps) of the last n of m positions, in the dtype of q."""
    n, m = len(q), len(k)
    scores = torch.einsum("nhgd,mhd->nhgm", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(n, m, dtype=torch.bool).triu_(1 + m - n)
    scores = scores.masked_fill(later[:, None, None], float("-inf"))
    return torch.einsum("nhgm,mhd->nhgd", scores.softmax(-1), v), scores.logsumexp(-1)


@needs_compiler
@settings(max_examples=60)
@given(
    n=st.integers(1, 80),
    before=st.integers(0, 70),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([16, 48, 64, 80, 128]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_attention_in_training_is_exact_and_in_bf16_near(n, before, kv, group, dim, threads):
    inputs = torch.randn(n, kv, group, dim), torch.randn(n + before, kv, dim), torch.randn(n + before, kv, dim)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected, expected_sums = reference_attention(*exact)
    grad = torch.randn_like(inputs[0])
    expected.backward(grad.double())
    with torch_threads(threads):
        out, sums = kernels.attend(*inputs, torch.float32)
        rounded = kernels.attend(*inputs, torch.bfloat16) if has_bf16() else (out, sums)
        found = kernels.attend_backward(*inputs, *rounded, grad) if has_bf16() else []
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.double(), expected_sums, atol=1e-5, rtol=1e-5)
    assert (rounded[0] - expected).norm() < 0.01 * expected.norm()
    assert (rounded[1] - expected_sums).abs().max() < 0.05
    for gradient, tensor in zip(found, exact, strict=bool(found)):
        assert (gradient - tensor.grad).norm() < 0.02 * (tensor.grad.norm() + grad.norm())


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_gradient_of_attention_has_the_same_bits_in_every_run(threads):
    inputs = torch.randn(300, 3, 2, 64), torch.randn(300, 3, 64), torch.randn(300, 3, 64)
    with torch_threads(threads):
        out, sums = kernels.attend(*inputs, torch.bfloat16)
        first, *others = [kernels.attend_backward(*inputs, out, sums, torch.ones_like(out)) for _ in range(6)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def random_model(family: str, group: int, dim: int, products: torch.dtype | None = None) -> Transformer:
    shape = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": dim}
    shape |= {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = parse_config({"model_type": family, "max_position_embeddings": 4096, **shape}, "a random model")
    model = Transformer(config, product_dtype=products).requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def torchs_layers(model, x, cos, sin, *step):
    attention = KeptAttention(*step)
    for index, layer in enumerate(model.decoder.layers):
        x = layer.finish(x, attention(index, *layer.self_attention.qkv(x, cos, sin)))
    return x


def both(model, monkeypatch, sequences, appends):
    """(kernels', torch's) residual streams and kept tensors: a token each after `sequences`, and `appends`, pairs of
    tokens kept and tokens added."""
    starts = [*map(len, sequences), *(start for start, _ in appends)]
    lengths = [1] * len(sequences) + [length for _, length in appends]
    dim, rows = model.decoder.layers[0].self_attention.head_dim, sum(lengths)
    table = torch.randn(3, max(starts) + 1, 2, 2, 2, dim)  # of a token at a position, in two layers
    kept = []
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = torch.tensor(sequences[index] if index < len(sequences) else [0] * start, dtype=torch.long)
        capacity = (start + length + 34) // 32 * 32
        kv = torch.full((2, 2, 2, capacity, dim), float("nan"))  # what was not written must not be read
        kv[..., :start, :] = table[tokens, torch.arange(start)].permute(1, 2, 3, 0, 4)
        kept.append(kv)
    positions = torch.tensor([i for s, n in zip(starts, lengths, strict=True) for i in range(s, s + n)])
    cos, sin = model.rope(positions)
    x, plan, found = torch.randn(rows, model.config.hidden_size), decode_plan(sequences), []
    for switch, layers in (("1", CompiledDecoder(model)), ("0", lambda *step: torchs_layers(model, *step))):
        monkeypatch.setenv(kernels.SWITCH, switch)
        compiled = switch == "1"
        caches = [kernels_order(kv.to(model.product_dtype)) if compiled else kv.clone() for kv in kept]
        out = layers(x.clone(), cos, sin, caches, starts, lengths, plan)
        caches = [torchs_order(kv).float() if compiled else kv for kv in caches]
        written = [kv[..., : s + n, :] for kv, s, n in zip(caches, starts, lengths, strict=True)]
        found.append([out, *written])
    return found


def kernels_order(kv):
    """Keys and values [.., 2, kv_heads, capacity, D] as kernels.c keeps them, in their dtype."""
    keys, values = kv.unbind(1)
    pair, width = 2 if kv.dtype == torch.bfloat16 else 1, kernels.library().panel_width()
    keys = keys.unflatten(-1, (-1, pair)).unflatten(-3, (-1, width)).transpose(-2, -3)
    values = values.unflatten(-2, (-1, pair)).transpose(-1, -2)
    if pair == 2:  # an absent partner has zeros
        values = torch.where(values.isnan() & ~values.isnan()[..., :1], 0, values)
    return torch.stack([x.reshape(kv[:, 0].shape) for x in (keys, values)], 1)


def torchs_order(kv):
    """The reverse of `kernels_order`."""
    keys, values = kv.unbind(1)
    pair, width, dim = 2 if kv.dtype == torch.bfloat16 else 1, kernels.library().panel_width(), kv.shape[-1]
    keys = keys.reshape(*keys.shape[:2], -1, dim // pair, width, pair).transpose(-2, -3)
    values = values.reshape(*values.shape[:2], -1, dim, pair).transpose(-1, -2)
    return torch.stack([x.reshape(kv[:, 0].shape) for x in (keys, values)], 1)


# Few different tokens, so that prefixes are shared in many ways.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8).map(sorted)
APPENDS = st.lists(st.tuples(st.integers(0, 40), st.integers(2, 40)), max_size=3)
ANY_STEP = {"sequences": SEQUENCES, "appends": APPENDS, "spared": st.sampled_from([1, 3, 100])}
ANY_STEP |= {"family": st.sampled_from(FAMILIES)}


@needs_compiler
@settings(max_examples=60)
@given(**ANY_STEP, group=st.integers(1, 4), dim=st.sampled_from([16, 48, 64, 80, 128]))
def test_any_step_is_torchs(sequences, appends, spared, family, group, dim):
    if sequences or appends:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slime_local.prefixes.MIN_SPARED_TOKENS", spared)
            ours, torchs = both(random_model(family, group, dim), patch, sequences, appends)
        for found, expected in zip(ours, torchs, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_bf16
@settings(max_examples=60)
@given(**ANY_STEP, dim=st.sampled_from([16, 48, 64, 128]))
def test_any_step_in_bf16_is_near_torchs(sequences, appends, spared, family, dim):
    """Beside torch's layers, whose products round what comes out as well: bf16 has 8 bits."""
    if sequences or appends:
        model = random_model(family, 2, dim, torch.bfloat16)
        assert fits(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slime_local.prefixes.MIN_SPARED_TOKENS", spared)
            ours, torchs = both(model, patch, sequences, appends)
        for found, expected in zip(ours, torchs, strict=True):
            assert (found - expected).norm() <= 0.02 * expected.norm()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("products", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_long_contexts_and_long_appends(monkeypatch, threads, products):
    """More keys and more rows than a part has; prefixes shared by some of the rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        system = [i % 3 for i in range(500)]
        sequences = sorted([*([*system, 0, *[i % 3] * 300] for i in range(5)), [1] * 700, [2] * 255, [2] * 256])
        model = random_model("llama", 3, 64, products)
        ours, torchs = both(model, monkeypatch, sequences, [(0, 600), (700, 300), (255, 65)])
    finally:
        torch.set_num_threads(before)
    for found, expected in zip(ours, torchs, strict=True):
        if products == torch.float32:
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        assert (found - expected).norm() < 0.02 * expected.norm()


@needs_compiler
def test_new_weights_are_used(monkeypatch):
    model = random_model("qwen3", 2, 16)
    decoder = CompiledDecoder(model)
    kept = [torch.randn(2, 2, 2, 32, 16)]
    step = torch.randn(1, 48), *model.rope(torch.arange(1)), kept, [0], [1], decode_plan([[]])
    before = decoder(step[0].clone(), *step[1:])
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.3  # as the trainer swaps in its reference
    model.weights_changed()
    after = decoder(step[0].clone(), *step[1:])
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, torchs_layers(model, *step), atol=1e-4, rtol=1e-4)


@needs_compiler
@settings(max_examples=60)
@given(
    n=st.sampled_from([1, 2, 255, 256, 257, 1000]),
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=5
    ),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_sampling_is_torchs(n, rows, spread):
    logits = torch.randn(len(rows), n) * spread
    temperatures, uniforms = zip(*rows, strict=True)
    ids, logprobs = kernels.sample(logits, temperatures, uniforms)
    for row, (id_, temperature, uniform) in enumerate(zip(ids, temperatures, uniforms, strict=True)):
        expected = torch.log_softmax(logits[row].double() / (temperature or 1), -1)
        assert logprobs[row] == pytest.approx(expected[id_].item(), abs=1e-4)
        if temperature == 0:
            assert id_ == logits[row].argmax()
        else:  # the token whose share of the cumulated probabilities holds the uniform number
            cumulated = expected.exp().cumsum(-1)
            assert (cumulated[id_ - 1] if id_ else 0) - 1e-5 <= uniform <= cumulated[id_] + 1e-5


def test_what_does_not_fit_is_left_to_torch(monkeypatch):
    assert not fits(random_model("llama", 1, 24))  # not a multiple of 16
    assert not kernels.available(torch.bfloat16, torch.bfloat16, CPU)
    assert not kernels.available(torch.float32, torch.float32, torch.device("cuda"))
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not fits(random_model("llama", 1, 16))


# ---- Building ------------------------------------------------------------------------------------------------------


def without_cache(monkeypatch, caplog):
    """library() again as a new process would call it, and the warnings it logs."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, kernels.__name__):
        return kernels.library.__wrapped__(), [record.getMessage() for record in caplog.records]


def failing_compiler(folder):
    path = folder / "cc"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cc: error: out of order" >&2\nexit 1\n')
    path.chmod(0o755)
    return path


def test_without_a_working_compiler_one_line_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert without_cache(monkeypatch, caplog) == (
        None,
        ["computing without compiled kernels, several times slower: no C compiler (install gcc, or name one in CC)"],
    )
    monkeypatch.setenv("CC", str(failing_compiler(tmp_path)))
    found, warnings = without_cache(monkeypatch, caplog)
    assert found is None and len(warnings) == 1 and warnings[0].endswith("fails: cc: error: out of order")
    assert list((tmp_path / "cache" / "slime_local").iterdir()) == []


def test_a_cache_that_others_can_write_is_refused(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "slime_local").mkdir()
    (tmp_path / "slime_local").chmod(0o777)
    found, warnings = without_cache(monkeypatch, caplog)
    assert found is None and "can be written by others" in warnings[0]


@needs_compiler
def test_compiled_once_into_a_private_folder(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert without_cache(monkeypatch, caplog)[0] is not None
    (built,) = (tmp_path / "slime_local").iterdir()
    assert (tmp_path / "slime_local").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(kernels, "_run", lambda *command: pytest.fail("compiled again"))
    assert without_cache(monkeypatch, caplog)[0] is not None
    assert list((tmp_path / "slime_local").iterdir()) == [built]


@needs_compiler
def test_one_pool_of_threads():
    """A second OpenMP library would bring threads of its own, and the denormals must stay as torch has them."""
    code = """
import re, torch
from slime_local import kernels
kernels.product(torch.randn(4, 64), kernels.panels(torch.randn(96, 64)), 96)
torch.randn(99, 99) @ torch.randn(99, 99)
found = set(re.findall(r"\\S*/lib[gi]?omp\\S*", open("/proc/self/maps").read()))
assert len(found) == 1, found
assert (torch.tensor([1e-39]) * 1).item() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_the_constants_are_those_of_the_source():
    source = kernels.SOURCE.read_text()
    assert f"#define LANES {kernels.LANES} " in source
    assert f"#define MAX_DIM {kernels.MAX_DIM} " in source
    assert f"#define TILE {kernels.TILE} " in source
    assert f"#define PANEL {KV_PANEL}\n" in source  # the widest
