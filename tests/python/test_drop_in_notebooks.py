"""Notebooks as courses and Unsloth's users write them, run in a kernel after one line on top.

Where torch, transformers, peft and trl are absent, stand-ins answer for them; where they are installed, the same cells
run over proxies, and nothing of theirs may have changed. Which of the two is tested depends on the environment alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

THEIRS = ("torch", "transformers", "peft", "trl", "unsloth")
INSTALLED = [name for name in THEIRS if importlib.util.find_spec(name) is not None]

# Facts of the modules that are installed, before anything of ours is there.
WATCH = f"""
import importlib, json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
installed = {INSTALLED!r}
for name in installed:
    importlib.import_module(name)
theirs = {{name: sys.modules[name] for name in (*installed, "torch.cuda") if name in sys.modules}}
before = {{name: dict(vars(module)) for name, module in theirs.items()}}
"""
DATASETS = "import datasets"
ON_TOP = "import rustune.drop_in"

# What both kinds of notebooks of Unsloth have.
ADAPT = """
model = FastLanguageModel.get_peft_model(
    model,
    r = 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
)
"""
SETTINGS = """
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 1,
        max_steps = 8,
        learning_rate = 2e-2,
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        report_to = "none","""
MEMORY_BEFORE = """
gpu_stats = torch.cuda.get_device_properties(0)
start_gpu_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
max_memory = round(gpu_stats.total_memory / 1024 / 1024 / 1024, 3)
print(f"GPU = {gpu_stats.name}. Max memory = {max_memory} GB.")
print(f"{start_gpu_memory} GB of memory reserved.")
"""
TRAIN = "trainer_stats = trainer.train()"
SAVE = """
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
# model.push_to_hub("your_name/lora_model", token = "...")
"""
LOAD_AGAIN = """
trained_model = model
if True:
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name = "lora_model",
        max_seq_length = 256,
        dtype = None,
        load_in_4bit = True,
    )
    FastLanguageModel.for_inference(model)
reloaded = model.generate(inputs, max_new_tokens = 16, do_sample = False)
"""

# How a notebook of late 2024 does it: conversations of ShareGPT, TrainingArguments, markers written out.
LATE_2024 = [
    """
from unsloth import FastLanguageModel
import torch
max_seq_length = 256
dtype = None
load_in_4bit = True
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = MODEL,
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
)
""",
    ADAPT,
    """
from unsloth.chat_templates import get_chat_template

tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.1")

def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False) for convo in convos]
    return { "text" : texts, }

from datasets import load_dataset
dataset = load_dataset("json", data_files = ROWS, split = "train")
""",
    """
from unsloth.chat_templates import standardize_sharegpt
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched = True,)
""",
    "dataset[5]['conversations']",
    "dataset[5]['text']",
    f"""
from trl import SFTTrainer
from transformers import TrainingArguments, DataCollatorForSeq2Seq
from unsloth import is_bfloat16_supported

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
    dataset_num_proc = 2,
    packing = False,
    args = TrainingArguments({SETTINGS}
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        output_dir = "outputs",
    ),
)
""",
    """
from unsloth.chat_templates import train_on_responses_only
trainer = train_on_responses_only(
    trainer,
    instruction_part = "<|start_header_id|>user<|end_header_id|>\\n\\n",
    response_part = "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)
""",
    "tokenizer.decode(trainer.train_dataset[5]['input_ids'])",
    """
space = tokenizer(" ", add_special_tokens = False).input_ids[0]
trained_text = tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[5]["labels"]])
trained_text
""",
    MEMORY_BEFORE,
    TRAIN,
    """
used_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
used_memory_for_lora = round(used_memory - start_gpu_memory, 3)
used_percentage = round(used_memory / max_memory * 100, 3)
lora_percentage = round(used_memory_for_lora / max_memory * 100, 3)
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")
print(f"{round(trainer_stats.metrics['train_runtime'] / 60, 2)} minutes used for training.")
print(f"Peak reserved memory = {used_memory} GB, for training {used_memory_for_lora} GB.")
print(f"Peak reserved memory % of max memory = {used_percentage} %, for training {lora_percentage} %.")
""",
    """
from unsloth.chat_templates import get_chat_template

tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.1")
FastLanguageModel.for_inference(model)

messages = [{"role": "user", "content": "Say a3"}]
inputs = tokenizer.apply_chat_template(
    messages,
    tokenize = True,
    add_generation_prompt = True,
    return_tensors = "pt",
).to("cuda")

outputs = model.generate(input_ids = inputs, max_new_tokens = 16, use_cache = True, temperature = 1.5, min_p = 0.1)
tokenizer.batch_decode(outputs)
""",
    """
from transformers import TextStreamer
text_streamer = TextStreamer(tokenizer, skip_prompt = True)
_ = model.generate(input_ids = inputs, streamer = text_streamer, max_new_tokens = 16, do_sample = False)
""",
    SAVE,
    LOAD_AGAIN,
    """
if False: model.save_pretrained_merged("model", tokenizer, save_method = "merged_16bit",)
if False: model.save_pretrained_gguf("model", tokenizer, quantization_method = "q4_k_m")
""",
]

# How one of 2026 does it: SFTConfig, markers found in the template, everything by keyword.
OF_2026 = [
    """
from unsloth import FastModel
import torch
model, tokenizer = FastModel.from_pretrained(
    model_name = MODEL,
    max_seq_length = 256,
    load_in_4bit = True,
    load_in_8bit = False,
    full_finetuning = False,
)
""",
    ADAPT.replace("FastLanguageModel", "FastModel"),
    """
from unsloth.chat_templates import get_chat_template, standardize_data_formats
from datasets import load_dataset
tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.2")
dataset = load_dataset("json", data_files = ROWS, split = "train")
dataset = standardize_data_formats(dataset)

def formatting_prompts_func(examples):
    texts = tokenizer.apply_chat_template(examples["conversations"], tokenize = False, add_generation_prompt = False)
    return { "text" : texts, }

dataset = dataset.map(formatting_prompts_func, batched = True)
dataset[5]["text"]
""",
    f"""
from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    eval_dataset = None,
    args = SFTConfig(
        dataset_text_field = "text",{SETTINGS}
    ),
)
""",
    """
from unsloth.chat_templates import train_on_responses_only
trainer = train_on_responses_only(trainer)
""",
    """
pad = tokenizer.pad_token_id
trained_text = tokenizer.decode([pad if x == -100 else x for x in trainer.train_dataset[5]["labels"]])
trained_text = trained_text.replace(tokenizer.pad_token, " ")
trained_text
""",
    MEMORY_BEFORE,
    TRAIN,
    """
messages = [{"role" : "user", "content" : "Say a3"}]
text = tokenizer.apply_chat_template(messages, tokenize = False, add_generation_prompt = True)
inputs = tokenizer(text, return_tensors = "pt", add_special_tokens = False).to("cuda").input_ids

from transformers import TextStreamer
_ = model.generate(
    **tokenizer(text, return_tensors = "pt", add_special_tokens = False).to("cuda"),
    max_new_tokens = 16,
    do_sample = False,
    streamer = TextStreamer(tokenizer, skip_prompt = True),
)
_ = model.generate(
    **tokenizer(text, return_tensors = "pt").to("cuda"),
    max_new_tokens = 16,
    temperature = 0.7, top_p = 0.8, top_k = 20,
)
""",
    SAVE,
    LOAD_AGAIN,
]

# How one of 2023 does it that was written for plain transformers with PEFT.
PLAIN_PEFT = [
    """
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TextStreamer,
    TrainingArguments,
    pipeline,
    logging,
    set_seed,
)
from peft import LoraConfig, PeftModel
from trl import SFTTrainer
set_seed(42)
""",
    """
rows = load_dataset("json", data_files = ROWS, split = "train")
dataset = rows.map(lambda row: {"text": "<s>[INST] " + row["conversations"][0]["value"] + " [/INST] "
                                + row["conversations"][1]["value"] + " </s>"}, remove_columns = ["conversations"])
compute_dtype = getattr(torch, "float16")
bnb_config = BitsAndBytesConfig(
    load_in_4bit = True,
    bnb_4bit_quant_type = "nf4",
    bnb_4bit_compute_dtype = compute_dtype,
    bnb_4bit_use_double_quant = False,
)
if compute_dtype == torch.float16:
    major, _ = torch.cuda.get_device_capability()
    if major >= 8:
        print("Your GPU supports bfloat16")
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config = bnb_config, device_map = {"": 0})
model.config.use_cache = False
model.config.pretraining_tp = 1
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code = True)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"
""",
    """
peft_config = LoraConfig(lora_alpha = 16, lora_dropout = 0.0, r = 64, bias = "none", task_type = "CAUSAL_LM")
training_arguments = TrainingArguments(
    output_dir = "./results",
    num_train_epochs = 1,
    per_device_train_batch_size = 4,
    gradient_accumulation_steps = 1,
    optim = "paged_adamw_32bit",
    save_steps = 100,
    logging_steps = 1,
    learning_rate = 2e-2,
    weight_decay = 0.001,
    fp16 = False,
    bf16 = False,
    max_grad_norm = 0.3,
    max_steps = -1,
    warmup_ratio = 0.03,
    group_by_length = False,
    lr_scheduler_type = "constant",
    report_to = "none",
)
trainer = SFTTrainer(
    model = model,
    train_dataset = dataset,
    peft_config = peft_config,
    dataset_text_field = "text",
    max_seq_length = None,
    tokenizer = tokenizer,
    args = training_arguments,
    packing = False,
)
trainer_stats = trainer.train()
trainer.model.save_pretrained("new_model")
""",
    """
logging.set_verbosity(logging.CRITICAL)
pipe = pipeline(task = "text-generation", model = model, tokenizer = tokenizer, max_length = 200)
result = pipe("<s>[INST] Say a3 [/INST]", max_new_tokens = 8)
print(result[0]["generated_text"])
""",
    """
base_model = AutoModelForCausalLM.from_pretrained(
    MODEL, low_cpu_mem_usage = True, return_dict = True, quantization_config = bnb_config, device_map = {"": 0},
)
inputs = tokenizer("<s>[INST] Say a3 [/INST]", return_tensors = "pt").input_ids.to("cuda")
streamed = model.generate(
    inputs, max_new_tokens = 16, do_sample = False, streamer = TextStreamer(tokenizer, skip_prompt = True)
)
trained_model, model = model, PeftModel.from_pretrained(base_model, "new_model")
reloaded = model.generate(inputs, max_new_tokens = 16, do_sample = False)
trained_text = tokenizer.decode([id for id in trainer.train_dataset[5]["labels"] if id != -100])
""",
]

# What else a notebook does in the same process, after a step of training.
AROUND = [
    """
from transformers import StoppingCriteria, StoppingCriteriaList
class StopOn(StoppingCriteria):
    def __init__(self, stops = []):
        self.stops = stops
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> bool:
        for stop in self.stops:
            if torch.all(stop == input_ids[0][-len(stop):]).item():
                return True
        return False
answer = trained_model.generate(inputs, max_new_tokens = 16, do_sample = False)
second = torch.tensor([int(answer[0, inputs.shape[1] + 1])])
stopped = trained_model.generate(
    inputs, max_new_tokens = 16, do_sample = False, stopping_criteria = StoppingCriteriaList([StopOn([second])]),
)
""",
    """
import datasets
counted = dataset.map(lambda batch: {"n": [len(ids) for ids in tokenizer(batch["text"]).input_ids]}, batched = True)
forked = dataset.map(lambda row: {"n": len(tokenizer(row["text"]).input_ids)}, num_proc = 2)
with_torch = dataset.map(lambda row: {"n": torch.tensor([len(row["text"])]).sum().item()}, num_proc = 2)
streamed = list(dataset.to_iterable_dataset().map(lambda row: {"n": len(tokenizer(row["text"]).input_ids)}))
""",
    """
from trl import SFTTrainer, SFTConfig
streaming = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset.to_iterable_dataset(),
    args = SFTConfig(max_steps = 2, dataset_text_field = "text", output_dir = "streamed", report_to = "none"),
)
streaming.train()
""",
    """
import pandas as pd
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
frame = pd.DataFrame(trainer.state.log_history)
figure, axes = plt.subplots()
axes.plot(frame["step"], frame["loss"])
figure.savefig("loss.png")
""",
    """
changed = sorted(
    f"{name}.{key}"
    for name, module in theirs.items()
    for key, value in before[name].items()
    if vars(module).get(key, None) is not value
)
ours = sorted(
    f"{name}.{key}"
    for name, module in theirs.items()
    for key, value in vars(module).items()
    if str(getattr(value, "__module__", "")).startswith("rustune")
)
served = {
    "TextStreamer": TextStreamer.__module__,
    "SFTTrainer": SFTTrainer.__module__,
    "is_available": torch.cuda.is_available(),
}
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
prompt_length = inputs.shape[1]
rustune.drop_in.uninstall()
left = {
    name: type(sys.modules[name]).__module__
    for name in ("torch", "torch.cuda", "transformers", "peft", "trl", "unsloth", "unsloth.chat_templates")
    if name in sys.modules
}
back = all(sys.modules[name] is module for name, module in theirs.items())
after = dataset.map(lambda row: {"n": len(row["text"])}, num_proc = 2)["n"][0], len(list(dataset.to_iterable_dataset()))
facts = {
    "python": sys.executable,
    "changed": changed,
    "ours": ours,
    "served": served,
    "left": left,
    "back": back,
    "after": after,
    "losses": losses,
    "steps": trainer_stats.global_step,
    "trained_text": trained_text,
    "streamed_text": tokenizer.decode(answer[0, prompt_length:]),
    "stopped": (answer[0, prompt_length:].tolist(), stopped[0, prompt_length:].tolist()),
    "same_when_reloaded": answer.tolist() == reloaded.tolist(),
    "counts": [list(column) for column in (counted["n"], forked["n"], [row["n"] for row in streamed])],
    "lengths": [len(text) for text in dataset["text"]],
    "with_torch": list(with_torch["n"]),
    "plotted": os.path.getsize("loss.png"),
}
print("FACTS " + json.dumps(facts))
""",
]


def conversations() -> list[dict[str, Any]]:
    """Rows of ShareGPT whose answers repeat what was said."""
    words = [f"{letter}{digit}" for letter in "abcdefgh" for digit in range(4)]
    return [
        {"conversations": [{"from": "human", "value": f"Say {word}"}, {"from": "gpt", "value": word}]} for word in words
    ]


def run(cells: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Runs cells in a kernel of this interpreter; returns the facts of the last one and all text the others printed."""
    tiny.write_model(folder / "model", llama_3=True, max_position_embeddings=512)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, conversations())))
    paths = f"MODEL = {str(folder / 'model')!r}\nROWS = {str(folder / 'rows.jsonl')!r}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in [paths, *cells]])
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "HF_HOME": str(folder / "hf"), "MPLCONFIGDIR": str(folder / "mpl")})
    printed = [
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    ]
    text = "".join(printed)
    facts = next(line for line in text.splitlines() if line.startswith("FACTS "))
    return json.loads(facts.removeprefix("FACTS ")), text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("order", ["datasets first", "datasets after"])
@pytest.mark.parametrize(
    ("cells", "trained_text"),
    [
        # Of "Say b1" and "b1", the answer and what ends it are trained, and nothing else.
        (LATE_2024, "b1<|eot_id|>"),
        (OF_2026, "b1<|eot_id|>"),
        # All of a text is.
        (PLAIN_PEFT, "<s>[INST] Say b1 [/INST] b1 </s>"),
    ],
    ids=["late 2024", "2026", "plain PEFT"],
)
def test_a_notebook_runs_after_one_line(cells: list[str], trained_text: str, order: str, tmp_path: Path) -> None:
    top = [WATCH, *([DATASETS, ON_TOP] if order == "datasets first" else [ON_TOP, DATASETS])]
    facts, text = run([*top, *cells, *AROUND], tmp_path)

    assert facts["python"] == sys.executable and "unsloth" not in INSTALLED
    assert facts["steps"] == 8 and len(facts["losses"]) == 8
    assert facts["losses"][-1] < 0.8 * facts["losses"][0]
    assert trained_text in facts["trained_text"] and len(facts["trained_text"].strip()) < len(trained_text) + 20
    assert facts["streamed_text"] and facts["streamed_text"] in text
    assert facts["same_when_reloaded"]
    answer, stopped = facts["stopped"]
    assert stopped == answer[: answer.index(answer[1]) + 1]
    assert ("GPU = " in text and "Max memory = " in text) or cells is PLAIN_PEFT
    assert facts["served"] == {
        "TextStreamer": "rustune.streamers",
        "SFTTrainer": "rustune.trainer",
        "is_available": False,
    }

    batched, forked, streamed = facts["counts"]
    assert len(batched) == 32 and batched == forked == streamed
    assert facts["with_torch"] == facts["lengths"]
    assert facts["plotted"] > 0

    assert facts["changed"] == [] and facts["ours"] == []
    assert facts["back"] and not any(owner.startswith("rustune") for owner in facts["left"].values())
    assert set(facts["left"]) <= {*INSTALLED, "torch.cuda"}
    assert facts["after"] == [facts["lengths"][0], 32]
