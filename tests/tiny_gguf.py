"""A tiny Llama in a GGUF file, quantised to 8 bits, with a tokenizer of bytes."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 4, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path, *, seed: int = 0, without: str = "") -> Path:
    """Write the file, with weights of this seed and without one of its tensors."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    numbers = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), WIDTH)}
    for block in (f"blk.{layer}" for layer in range(LAYERS)):
        shapes |= {
            f"{block}.attn_q": (WIDTH, WIDTH), f"{block}.attn_k": (WIDTH // 2, WIDTH),
            f"{block}.attn_v": (WIDTH // 2, WIDTH), f"{block}.attn_output": (WIDTH, WIDTH),
            f"{block}.ffn_gate": (HIDDEN, WIDTH), f"{block}.ffn_up": (HIDDEN, WIDTH),
            f"{block}.ffn_down": (WIDTH, HIDDEN),
        }  # fmt: skip
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]
    for name, shape in shapes.items():
        weight = numbers.normal(size=shape, scale=0.3).astype(np.float32)
        if name != without:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
