"""Rewriting notebooks: install cells and imports as they are found in the wild, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from rustune import ConfigError, cli, migrate

COLAB = """%%capture
import os, re
if "COLAB_" not in "".join(os.environ.keys()):
    !pip install unsloth
else:
    # Do this only in Colab notebooks! Otherwise use pip install unsloth
    import torch; v = re.match(r"[0-9]{1,}\\.[0-9]{1,}", str(torch.__version__)).group(0)
    xformers = "xformers==" + ("0.0.33.post1" if v=="2.9" else "0.0.32.post2")
    !pip install --no-deps bitsandbytes accelerate {xformers} peft trl triton cut_cross_entropy unsloth_zoo
    !pip install sentencepiece protobuf "datasets==4.3.0" "huggingface_hub>=0.34.0" hf_transfer
    !pip install --no-deps unsloth
!pip install transformers==4.56.2"""
OLD = """%%capture
!pip install unsloth
# Also get the latest nightly Unsloth!
!pip uninstall unsloth -y && pip install --upgrade --no-cache-dir "unsloth[colab-new] @ git+https://github.com/unslothai/unsloth.git"
"""


def notebook(*sources: str, **metadata: Any) -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "source": source, "outputs": [{"old": 1}], "execution_count": 3, "metadata": {}}
        for source in sources
    ]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def rewritten(source: str, **options: Any) -> tuple[str, migrate.Report]:
    made = notebook(source)
    report = migrate.rewrite(made, **options)
    return made["cells"][0]["source"], report


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (COLAB, '%pip install -q rustune "datasets==4.3.0"'),
        (OLD, "%pip install -q rustune"),
        ("!pip install -qU unsloth datasets\n", "%pip install -q rustune datasets"),
        ("!pip install torch \\\n    trl", "%pip install -q rustune"),
        ("import pandas\n!pip install unsloth -q\nx = 1", "import pandas\n%pip install -q rustune\nx = 1"),
        ("!pip install seaborn", "!pip install seaborn"),
        ("pip = 3\nprint(pip)", "pip = 3\nprint(pip)"),
    ],
)
def test_install_cells(source: str, expected: str) -> None:
    assert rewritten(source)[0] == expected


def test_only_one_cell_installs() -> None:
    made = notebook("!pip install unsloth", "!pip install trl peft", "!pip install trl rouge_score")
    migrate.rewrite(made)
    sources = [cell["source"] for cell in made["cells"]]
    assert sources[0] == "%pip install -q rustune" and sources[1].startswith("#")
    assert sources[2] == "%pip install -q rouge_score"
    assert made["cells"][0]["outputs"] == [] and made["cells"][0]["execution_count"] is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from unsloth import FastLanguageModel", "from rustune import FastLanguageModel"),
        ("import unsloth", "import rustune as unsloth"),
        ("import unsloth as u, os", "import rustune as u\nimport os"),
        (
            "from unsloth.chat_templates import (\n    get_chat_template,\n    standardize_sharegpt as s,\n)\nx = 1",
            "from rustune.chat_templates import get_chat_template, standardize_sharegpt as s\nx = 1",
        ),
        (
            "if True:\n    from trl import SFTTrainer, ABCTrainer # here",
            "if True:\n    from rustune import SFTTrainer; from trl import ABCTrainer # here",
        ),
        (
            "from trl import SFTTrainer; x = 'é'; from unsloth import FastModel",
            "from rustune import SFTTrainer; x = 'é'; from rustune import FastModel",
        ),
        ("%load_ext x\nfrom unsloth import FastModel\n!ls", "%load_ext x\nfrom rustune import FastModel\n!ls"),
        ("from transformers import WhisperModel", "from transformers import WhisperModel"),
        ("from . import unsloth", "from . import unsloth"),
        ("print('from unsloth import x')", "print('from unsloth import x')"),
        ("%%bash\nfrom unsloth import x", "%%bash\nfrom unsloth import x"),
    ],
)
def test_imports(source: str, expected: str) -> None:
    assert rewritten(source)[0] == expected


def test_what_stays_is_reported() -> None:
    _, report = rewritten(
        "from trl import NoTrainer, SFTConfig\nfrom unsloth import *\nm.save_pretrained_gguf('x')\nimport vllm"
    )
    said = " | ".join(text for _, text in report.left)
    for part in ("no NoTrainer", "import *", "GGUF", "vLLM", "no install cell"):
        assert part in said
    _, report = rewritten("from unsloth import (")
    assert "cannot be read as Python" in report.left[0][1]


@pytest.mark.parametrize(
    "source", ["from unsloth import FastModel", "%%time\n# first\nimport trl", "import peft.utils"]
)
def test_drop_in_is_one_line_above(source: str) -> None:
    made, report = rewritten(source, drop_in=True)
    assert made.replace("import rustune.drop_in\n", "", 1) == source and "import rustune.drop_in\n" in made
    assert made.split("\n").index("import rustune.drop_in") == next(
        at for at, line in enumerate(source.split("\n")) if not line.startswith(("%", "#"))
    )
    assert (1, "import rustune.drop_in") in report.done


def test_the_made_imports_can_be_imported() -> None:
    source = (
        "from unsloth import FastLanguageModel, is_bfloat16_supported\nfrom trl import SFTTrainer, SFTConfig\n"
        "from unsloth.chat_templates import train_on_responses_only, get_chat_template, standardize_sharegpt\n"
        "from transformers import TrainingArguments, EarlyStoppingCallback"
    )
    made, report = rewritten(source)
    assert [text for _, text in report.left] == ["no install cell was found: pip install rustune before running it"]
    assert "unsloth" not in made and "trl" not in made and len(ast.parse(made).body) == 4
    exec(compile(made, "cell", "exec"), {})


def test_the_command_never_overwrites_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine.ipynb"
    text = json.dumps(notebook(COLAB, "from unsloth import FastModel", accelerator="GPU", colab={"gpuType": "T4"}))
    source.write_text(text)
    assert cli.main(["migrate", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "cell 1: install cell" in shown and "4 changes" not in shown and "3 changes, 0 to look at" in shown
    target = tmp_path / "mine.rustune.ipynb"
    made = json.loads(target.read_text())
    assert source.read_text() == text and made["metadata"] == {"colab": {}}
    assert cli.main(["migrate", str(source)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["migrate", str(source), "--out", str(tmp_path / "a.ipynb")]) == 0
    assert cli.main(["migrate", str(source), "--force"]) == 0
    assert cli.main(["migrate", str(source), "--in-place"]) == 0
    assert json.loads(source.read_text()) == made


@pytest.mark.parametrize("text", ["{", "[]", '{"nbformat": 3, "worksheets": []}', '{"cells": 3, "nbformat": 4}'])
def test_what_is_no_notebook_is_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ipynb").write_text(text)
    assert cli.main(["migrate", str(tmp_path / "x.ipynb")]) == 1
    assert "notebook" in capsys.readouterr().err
    if text != "{":
        with pytest.raises(ConfigError, match="format 4"):
            migrate.rewrite(json.loads(text))
