"""Notebooks: ours are kept clean, and a run in a kernel is shown, interrupted and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import tiny
from conftest import ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

OURS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SETUP = """
import os, signal
from rustune import FastLanguageModel, SFTConfig, SFTTrainer, TrainerCallback

class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)  # what the stop button does

def train(out, stop=None):
    model, _ = FastLanguageModel.from_pretrained({folder!r}, 64, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
    rows = [{{"input_ids": [(3 * i + k) % 256 for i in range(12)]}} for k in range(24)]
    args = SFTConfig(out, max_steps=16, save_steps=3, learning_rate=1e-2, eval_strategy="steps", eval_steps=5)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[Stop(stop)])
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(out)
    return open(out + "/adapter_model.safetensors", "rb").read(), trainer

"""


def test_there_are_five() -> None:
    assert len(OURS) == 5


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_ours_are_clean_and_short(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) <= 40
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert first.startswith("# ") and "**What you need:**" in first and "CPU" in first
    # Which lines to change, and how long it takes then.
    assert last.startswith("## For a real model") and "```python" in last and "Llama-3.2-1B" in last
    assert re.search(r"(?s)\*\*How long:\*\* .*(hours|tokens a second|\d s )", last)


def test_two_interruptions_change_nothing(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "llama")
    expected = {"tags": ["raises-exception"]}
    cells = [
        new_code_cell(SETUP.format(folder=str(folder))),
        *(new_code_cell(f"train('stopped', stop={step})", metadata=expected) for step in (7, 10)),
        new_code_cell("resumed, _ = train('stopped')"),
        new_code_cell("whole, trainer = train('whole')"),
        new_code_cell("print(resumed == whole)"),
        new_code_cell("trainer.plot_loss()"),
    ]
    notebook = new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    said = ["".join(str(output.get("text", "")) for output in cell.outputs) for cell in notebook.cells]
    pages = [
        "".join(output.data.get("text/html", "") for output in cell.outputs if "data" in output)
        for cell in notebook.cells
    ]
    names = [[output.ename for output in cell.outputs if output.output_type == "error"] for cell in notebook.cells]
    assert names[1] == names[2] == ["KeyboardInterrupt"] and names[3] == names[4] == []
    assert "stopped holds no checkpoint to go on from: starting afresh" in said[1]
    assert re.search(r"going on from stopped.checkpoint-6", said[2])
    assert re.search(r"going on from stopped.checkpoint-9", said[3])
    assert said[5] == "True\n"
    # The table as it stood when the run was stopped (the signal comes around the end of step 7), and when it was done.
    assert re.search(r"stopped at [678]/16", pages[1]) and "Training Loss" in pages[1] and "Validation Loss" in pages[1]
    assert "16/16" in pages[4] and "stopped" not in pages[4] and "tok/s" in pages[4] and "at most" in pages[4]
    (picture,) = notebook.cells[6].outputs
    assert picture.data["image/png"].startswith("iVBORw0KGgo")
