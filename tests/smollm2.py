"""SmolLM2-135M as transformers computes it: the oracle of loading and of generation."""

from pathlib import Path

import gguf
import numpy as np
import pytest


def transformers_model(path: Path):
    """SmolLM2 as transformers computes it, from tensors that the gguf package dequantised."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        max_position_embeddings=8192,
    )
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            array = halves(array, heads=9 if "attn_q" in tensor.name else 3)
        state[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(array))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def hugging_face_name(name: str) -> str:
    for old, new in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }.items():
        name = name.replace(old, new)
    return name


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Written anew here: row 2 i + j of each head becomes row j * half + i."""
    heads_first = weight.reshape(heads, -1, weight.shape[-1])
    return np.concatenate([heads_first[:, 0::2], heads_first[:, 1::2]], axis=1).reshape(
        weight.shape
    )
