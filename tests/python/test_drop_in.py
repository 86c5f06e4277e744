"""The names that `import rustune.drop_in` takes, with stand-ins, over installed packages, and given back again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rustune
from rustune.drop_in.names import ALWAYS, PROXIED, STAND_INS

# The tests themselves import the tables, which installs the names; they look at everything in processes of their own.
rustune.drop_in.uninstall()

# What must resolve after the one line, as the notebooks write it.
IMPORTS = """
from unsloth import FastLanguageModel, FastModel, is_bfloat16_supported, is_bf16_supported
from unsloth import UnslothTrainer, UnslothTrainingArguments, unsloth_train, add_new_tokens, to_sharegpt
from unsloth import standardize_sharegpt, apply_chat_template
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, standardize_data_formats
from unsloth.chat_templates import train_on_responses_only, to_sharegpt, apply_chat_template, CHAT_TEMPLATES
from trl import SFTTrainer, SFTConfig, DPOTrainer, DPOConfig, ORPOTrainer, ORPOConfig
from transformers import TrainingArguments, DataCollatorForSeq2Seq, DataCollatorForLanguageModeling, TextStreamer
from transformers import TextIteratorStreamer, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from transformers import BitsAndBytesConfig, AutoModelForCausalLM, Trainer, GenerationConfig, set_seed, pipeline
from peft import AutoPeftModelForCausalLM, PeftModel, LoraConfig, get_peft_model, prepare_model_for_kbit_training
"""
# What else a library asks of the two it believes to see.
PROBES = """
import torch, transformers
torch.Tensor, torch.Generator, torch.nn.Module, torch.bfloat16, torch.float16, torch.float32, torch.no_grad
torch.utils.data.IterableDataset, torch.utils.data.get_worker_info
transformers.PreTrainedTokenizerBase, transformers.logging
from transformers.trainer_utils import set_seed
from transformers.utils import logging
import torch.nn.functional as F
from torch.utils.data import DataLoader
"""


def run(code: str, *paths: Path) -> str:
    """Runs code in a process of its own, with folders of made-up packages first; returns what it printed."""
    where = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture
def present(tmp_path: Path) -> Path:
    """A folder with made-up packages under their names, which tell how they are used."""
    for name, files in {
        "torch": {
            "__init__.py": "print('torch is loaded')\nfrom torch import cuda\n__version__ = '9.9'\n"
            "def tensor(x): return ['their tensor', x]\n",
            "cuda.py": "import os\ndef is_available(): return bool(os.environ.get('HAS_CUDA'))\n"
            "def device_count(): return 7\ndef get_device_name(device=None): return 'their device'\n",
            "extra.py": "import torch\nvalue = torch.tensor(1)\n",
        },
        "transformers": {
            "__init__.py": "from .early import once\nclass TrainingArguments: pass\nclass LlamaConfig: pass\n"
            "__version__ = '9.8'\ndef set_seed(seed): raise RuntimeError('theirs')\n",
            "early.py": "print('early is loaded')\nonce = 1\n",
            "utils.py": "from transformers import LlamaConfig, TrainingArguments\nmark = 1\n",
        },
        "peft": {"__init__.py": "class LoraConfig: pass\nclass PeftConfig: pass\n"},
        "trl": {"__init__.py": "class SFTTrainer: pass\nclass GRPOTrainer: pass\n"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    return tmp_path


def test_every_name_in_the_tables_is_there() -> None:
    code = f"""
import sys
import rustune.drop_in
from rustune.drop_in.aliases import StandIn
tables = {[{**ALWAYS}, {**PROXIED}, {**STAND_INS}]!r}
count = 0
for table in tables:
    for module_name, names in table.items():
        module = sys.modules.get(module_name)
        if module is None or (table is tables[2] and not isinstance(module, StandIn)):
            continue
        for name in names:
            assert name in dir(module), (module_name, name)
            getattr(module, name)
            count += 1
print(count)
"""
    assert int(run(code)) > 60  # with the real libraries there are no stand-ins to count


def test_the_imports_of_notebooks_resolve_to_ours() -> None:
    listed = [line.partition(" import ")[2].split(", ") for line in IMPORTS.split("\n")]
    names = sorted({name for line in listed for name in line if name})
    assert len(names) > 35
    code = f"""
import rustune, rustune.drop_in
{IMPORTS}
for name in {names}:
    found = globals()[name]
    assert found is getattr(rustune, name), name
    assert (getattr(found, "__module__", None) or type(found).__module__).startswith("rustune"), name
print("ok")
"""
    assert run(code) == "ok\n"


def test_libraries_find_what_they_ask_for() -> None:
    assert run(f"import rustune.drop_in\n{PROBES}\nprint('ok')").endswith("ok\n")


def test_what_stands_in_says_so(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) for name in PROXIED if "." not in name):
        pytest.skip("torch, transformers or peft are installed: nothing stands in for them")
    code = """
import importlib.util
import rustune.drop_in
import torch, trl
def said(statement):
    try:
        exec(statement)
    except (ImportError, AttributeError) as error:
        return type(error).__name__ + ": " + str(error)
    return "nothing"
for statement in ("from torch import jit", "import torch.jit", "torch.jit", "from trl import GRPOTrainer",
                  "import trl.models", "from unsloth import FastVisionModel", "from transformers import BertModel"):
    print(said(statement))
assert not hasattr(torch, "jit") and importlib.util.find_spec("torch").origin == "rustune.drop_in"
assert "not installed" in repr(torch) and "not installed" in torch.__doc__
"""
    lines = run(code).splitlines()
    told = "is not there: torch is not installed; rustune stands in for it"
    for line, kind in zip(lines[:3], ("ModuleNotFound", "ModuleNotFound", "Attribute"), strict=True):
        assert line.startswith(f"{kind}Error: torch.jit {told}")
    assert "trl.GRPOTrainer is not there: rustune answers for trl" in lines[3]
    assert "trl.models is not there" in lines[4]
    assert "unsloth.FastVisionModel is not there: rustune answers for unsloth" in lines[5]
    assert "transformers.BertModel is not there: transformers is not installed" in lines[6]


@pytest.mark.parametrize("name", ["DPOTrainer", "DPOConfig", "ORPOTrainer", "ORPOConfig"])
def test_preference_training_can_be_imported_and_says_that_it_comes_later(name: str) -> None:
    with pytest.raises(rustune.ConfigError, match=f"{name}: not there yet"):
        getattr(rustune, name)("model", beta=0.1)


def test_what_transformers_tells_can_be_quieted() -> None:
    before = rustune.logging.get_verbosity()
    try:
        rustune.logging.set_verbosity_error()
        assert rustune.logging.get_verbosity() == rustune.logging.ERROR == rustune.logging.get_logger().level
        rustune.logging.set_verbosity(rustune.logging.CRITICAL)
        assert not rustune.logging.get_logger("transformers.x").isEnabledFor(rustune.logging.ERROR)
    finally:
        rustune.logging.set_verbosity(before)


def test_taking_and_giving_back_can_be_done_again_and_again() -> None:
    code = """
import sys
def state():
    tops = ("torch", "transformers", "peft", "trl", "unsloth")
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}, list(sys.meta_path)
import rustune
before = state()
import rustune.drop_in
from rustune import drop_in
taken = state()
import rustune.drop_in
drop_in.install()
assert state() == taken != before
drop_in.uninstall()
assert state() == before
drop_in.uninstall()
assert state() == before and not hasattr(rustune, "drop_in")
import rustune.drop_in
import unsloth
assert unsloth.FastLanguageModel is rustune.FastLanguageModel and set(state()[0]) == set(taken[0])
rustune.drop_in.uninstall()
assert state() == before
print("ok")
"""
    assert run(code) == "ok\n"


@pytest.mark.parametrize("order", ["before", "after", "never"])
def test_installed_packages_are_answered_for_and_left_as_they_are(present: Path, order: str) -> None:
    load = "import torch, transformers, peft, trl\n"
    code = f"""
import sys
{load if order == "before" else ""}
early = {{name: (module, dict(vars(module))) for name, module in sys.modules.items() if name in
    ("torch", "torch.cuda", "transformers", "peft", "trl")}}
import rustune, rustune.drop_in
assert ("torch.cuda" in early) == {order == "before"}
import torch, transformers, peft, trl
print("taken")
assert torch.__version__ == "9.9" and torch.tensor(2) == ["their tensor", 2]
assert torch.cuda.device_count() == 7 and not torch.cuda.is_available()
assert torch.cuda.get_device_name(0) != "their device" and torch.cuda.get_device_properties(0).total_memory > 2**20
from torch.cuda import max_memory_reserved
assert max_memory_reserved() > 2**20
import torch.extra
assert torch.extra.value == ["their tensor", 1]
assert transformers.LlamaConfig.__module__ == "transformers"
assert transformers.TrainingArguments is rustune.TrainingArguments
import transformers.utils
assert transformers.utils.mark == 1
transformers.new_thing = 3
assert transformers.new_thing == 3
del transformers.new_thing
assert not hasattr(transformers, "new_thing")
assert peft.PeftConfig.__module__ == "peft" and peft.LoraConfig is rustune.LoraConfig
assert trl.SFTTrainer is rustune.SFTTrainer and not hasattr(trl, "GRPOTrainer")
assert "LlamaConfig" in dir(transformers) and "TextStreamer" in dir(transformers)
rustune.drop_in.uninstall()
import torch, transformers, peft, trl
assert transformers.TrainingArguments.__module__ == "transformers" and trl.GRPOTrainer.__module__ == "trl"
assert torch.cuda.get_device_name(0) == "their device"
assert torch.extra.value and transformers.utils.mark
assert "rustune" not in repr([torch, torch.cuda, transformers, peft, trl])
for name, (module, values) in early.items():
    assert sys.modules[name] is module
    now = dict(vars(module))
    new = set(now) - set(values)
    assert all(now[key] is value for key, value in values.items()) and new <= {{"utils", "extra"}}, (name, new)
print("ok")
"""
    if order == "never":
        # What nobody asks for is not imported, nor by those who only look around.
        code = """
import sys
import rustune.drop_in
import torch
import inspect, doctest, warnings
inspect.getmodule(print)
for module in list(sys.modules.values()):
    getattr(module, "__warningregistry__", None), getattr(module, "__wrapped__", None)
rustune.drop_in.uninstall()
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
print("ok")
"""
        assert run(code, present) == "ok\n"
    else:
        told = ["torch is loaded", "early is loaded"]
        told = [*told, "taken"] if order == "before" else ["taken", *told]
        assert run(code, present).split("\n") == [*told, "ok", ""]


def test_what_lies_below_a_package_is_imported_after_it_and_once(present: Path) -> None:
    code = """
import rustune.drop_in
import transformers.early
import sys
early = sys.modules["transformers.early"]
assert early.once == 1 and early is transformers.early and early.__spec__.origin == early.__file__
assert early.__loader__ is early.__spec__.loader and transformers.LlamaConfig
from transformers.utils import mark
assert mark == 1
print("ok")
"""
    assert run(code, present) == "early is loaded\nok\n"


def test_a_machine_with_cuda_answers_for_itself(present: Path) -> None:
    code = """
import os
import rustune.drop_in
import torch
assert torch.cuda.get_device_name(0) != "their device"
os.environ["HAS_CUDA"] = "1"
assert torch.cuda.get_device_name(0) == "their device"
assert not hasattr(torch.cuda, "max_memory_reserved")
"""
    run(code, present)


def test_a_package_that_fails_to_load_fails_as_it_would(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise RuntimeError('broken installation')")
    code = """
import rustune.drop_in
import peft
assert peft.LoraConfig.__module__.startswith("rustune")
for _ in range(2):
    try:
        peft.PeftConfig
    except RuntimeError as error:
        print(error)
rustune.drop_in.uninstall()
"""
    assert run(code, tmp_path) == "broken installation\n" * 2


def test_modules_can_be_pickled_by_their_names() -> None:
    code = """
import pickle
import rustune.drop_in
import torch, unsloth, transformers.utils
for module in (torch, torch.cuda, unsloth, unsloth.chat_templates):
    assert pickle.loads(pickle.dumps(module)) is module
print("ok")
"""
    assert run(code) == "ok\n"


def test_the_stand_in_for_torch_computes_what_notebooks_ask() -> None:
    from rustune.drop_in import machine
    from rustune.drop_in import torch_stand_in as torch

    rustune.drop_in.uninstall()
    facts = rustune.info()
    properties = machine.get_device_properties("cuda:0")
    assert properties.name and properties.total_memory == facts["total_memory_bytes"]
    assert 0 < machine.memory_reserved() <= 1.1 * machine.max_memory_reserved()
    assert machine.max_memory_reserved() >= facts["peak_rss_bytes"]
    assert machine.mem_get_info()[1] == facts["total_memory_bytes"] and machine.get_device_capability() == (0, 0)
    assert "no CUDA" in machine.memory_summary() and machine.current_device() == 0

    @torch.no_grad()
    def double(x: int) -> int:
        return 2 * x

    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert double(3) == 6
    assert (str(torch.bfloat16), torch.float16.itemsize, torch.bfloat16.itemsize) == ("torch.bfloat16", 2, 2)
    assert torch.tensor([1.5]).dtype == "float32" and torch.tensor([1]).to("cuda").dtype == "int64"
    assert torch.exp(torch.tensor(0.0)).item() == 1 and torch.argmax([[1, 3], [5, 2]], dim=-1).tolist() == [1, 0]
    assert torch.softmax(torch.zeros(1, 4), dim=-1).tolist() == [[0.25] * 4]
    assert torch.log_softmax(torch.zeros((4,)), dim=0).sum().item() == pytest.approx(4 * -1.3862943, rel=1e-6)
    assert torch.cat([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]
    assert torch.stack([torch.arange(2), torch.arange(2)], dim=1).tolist() == [[0, 0], [1, 1]]
    assert torch.device("cuda:0").type == "cuda" and torch.is_tensor(torch.ones_like([1]))
    rows = [{"input_ids": [i, i]} for i in range(5)]
    batches = list(torch.DataLoader(rows, batch_size=2))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert len(torch.DataLoader(rows, batch_size=2, drop_last=True)) == 2
