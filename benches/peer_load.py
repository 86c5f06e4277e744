"""Seconds and peak memory of transformers + bitsandbytes quantizing a folder to NF4 while loading, as a line of JSON.

Run by benches/load.py with the interpreter that has torch, transformers and bitsandbytes; not part of the package.
"""

import argparse
import json
import os
import resource
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
args = parser.parse_args()
torch.set_num_threads(len(os.sched_getaffinity(0)))
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(
    args.folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
)
seconds = time.perf_counter() - started
quantized = model.get_memory_footprint()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "model": quantized}))
