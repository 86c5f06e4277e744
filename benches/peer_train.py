"""The same training steps with torch, transformers, PEFT and bitsandbytes, for benches/train.py to compare.

Run by an interpreter that has them; imports nothing of rustune. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path


def main() -> None:
    """Times optimizer steps of LoRA on a model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--mode", choices=["nf4", "bf16", "f32"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--checkpointing", choices=["unsloth", "true", "false"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    try:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        if options.mode == "nf4":
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    torch.manual_seed(0)
    recompute = options.checkpointing != "false"
    dtype = torch.float32 if options.mode == "f32" else torch.bfloat16
    arguments = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": "cpu"}
    if options.mode == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.folder, **arguments)
    load_s = time.perf_counter() - started
    model.config.use_cache = False
    if options.mode == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=options.rank, lora_alpha=16, lora_dropout=options.dropout, target_modules=targets)
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.01)
    seconds = []
    for _ in range(options.steps + 1):
        ids = torch.randint(0, model.config.vocab_size, (options.batch, options.seq))
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.mode != "f32"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    print(json.dumps({"step_s": statistics.median(seconds[1:]), "peak_bytes": peak, "load_s": load_s}))


if __name__ == "__main__":
    main()
