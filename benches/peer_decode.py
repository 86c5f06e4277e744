"""Decode and prefill speed of llama.cpp (the `xllamacpp` wheel) on a Q4_0 GGUF of random weights, as a line of JSON.

Run by benches/decode.py with the interpreter that has `xllamacpp` and `gguf`; not part of the package. The tensor types
are those that llama.cpp's own `llama-quantize ... Q4_0` gives a model with tied embeddings: Q4_0, and Q6_K for the
shared table (`--table q4_0` makes that Q4_0 as well).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import xllamacpp


def blocks(rng: np.random.Generator, rows: int, cols: int, kind: str) -> np.ndarray:
    """Random blocks of a quantized matrix with scales of the size that real weights have, `[rows, bytes]`."""
    size, scale_at, weights = {"q4_0": (18, 0, 32), "q6_k": (210, 208, 256)}[kind]
    made = rng.integers(0, 256, (rows * cols // weights, size), dtype=np.uint8)
    scale = 0.004 if kind == "q4_0" else 3e-5
    made[:, scale_at : scale_at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return made.reshape(rows, -1)


def write(path: Path, shape: dict[str, int], table: str) -> None:
    """Writes the GGUF, tensor by tensor."""
    hidden, ffn, layers, vocab = shape["hidden"], shape["ffn"], shape["layers"], shape["vocab"]
    kv_width = shape["kv_heads"] * shape["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(vocab - 1)
    rng = np.random.default_rng(1)
    kinds = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q6_k": gguf.GGMLQuantizationType.Q6_K}

    def matrix(name: str, rows: int, cols: int, kind: str = "q4_0") -> None:
        writer.add_tensor(name, blocks(rng, rows, cols, kind), raw_dtype=kinds[kind])

    matrix("token_embd.weight", vocab, hidden, table)
    for i in range(layers):
        matrix(f"blk.{i}.attn_q.weight", hidden, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv_width, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv_width, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn)
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Makes the file if it is not there, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--table", choices=["q6_k", "q4_0"], default="q6_k")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    key = "-".join(str(value) for value in args.shape.values())
    path = args.folder / f"peer-{key}-{args.table}.gguf"
    if not path.exists():
        write(path.with_suffix(".part"), args.shape, args.table)
        path.with_suffix(".part").rename(path)

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = args.prompt + args.new + 64
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.verbosity = -1
    params.cache_prompt = False
    params.fit_params = False
    started = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - started

    def run(n_prompt: int, n_new: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, args.shape["vocab"] - 1, n_prompt).tolist()
        request = {"prompt": prompt, "n_predict": n_new, "ignore_eos": True, "cache_prompt": False, "top_k": 1}
        result = server.handle_completions(request)
        timings = result.get("timings")
        if timings is None:
            sys.exit(f"no timings in the answer: {str(result)[:500]}")
        return timings

    run(8, 4, 0)
    decode = [run(8, args.new, 1 + i)["predicted_per_second"] for i in range(args.repeat)]
    prefill = [run(args.prompt, 1, 11 + i)["prompt_per_second"] for i in range(args.repeat)]
    print(
        json.dumps(
            {
                "decode_tok_per_s": max(decode),
                "prefill_tok_per_s": max(prefill),
                "bytes": path.stat().st_size,
                "load_s": load_s,
                "version": xllamacpp.__version__,
                "system": xllamacpp.get_system_info(),
                "table": args.table,
            }
        )
    )


if __name__ == "__main__":
    main()
