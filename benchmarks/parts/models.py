"""The same weights as slime_local's model and as transformers' one."""

from __future__ import annotations

import tempfile

from common import smollm2_dir


def both_models(shape: str, device: str):
    """(slime_local's, {dtype: transformers'}): SmolLM2-135M-Instruct, or a random model of Qwen3-4B's shape. On a CPU
    transformers' comes in fp32 and bf16, for either can be the faster one."""
    import torch
    from transformers import AutoModelForCausalLM

    from slime_local.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        path = smollm2_dir() if shape == "smollm2" else random_qwen3_4b(folder)
        ours = load_model(path, device=device).requires_grad_(False)
        theirs = {}
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
            theirs[str(dtype).removeprefix("torch.")] = loaded.to(device).eval()
    return ours, theirs


def random_qwen3_4b(folder: str) -> str:
    """A model with random weights of Qwen3-4B-Instruct-2507's shape, written to `folder` in bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768}
    config = Qwen3Config(**shape, tie_word_embeddings=True, dtype=torch.bfloat16)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
