"""Make the golden files of the tests from PyTorch, transformers, PEFT and bitsandbytes.

The tests only read the files; this script is for making them anew. It needs a Python environment of its own:

    python -m venv .venv-golden
    .venv-golden/bin/pip install torch transformers peft bitsandbytes accelerate safetensors tokenizers numpy
    .venv-golden/bin/python tests/golden/make_golden.py            # all files
    .venv-golden/bin/python tests/golden/make_golden.py --only llama_gqa --only schedules
    .venv-golden/bin/python tests/golden/make_golden.py --list

Every file is a pure function of the seed, the library versions and the CPU's instruction set; all three are stored
in its metadata. README.md beside this file says what each one holds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from golden_common import one_thread
from golden_int8 import make_llama_int8
from golden_llama import CASES, make_llama, make_llama_nf4, make_peft
from golden_masks import make_masks
from golden_nf4 import make_nf4_extra
from golden_optim import make_adamw8bit, make_optimizers, make_randperm, make_schedules
from golden_stories import make_stories
from golden_variants import make_dora, make_loftq, make_pissa
from golden_vocab import make_peft_vocab, make_vocab

MAKERS: dict[str, Callable[[], None]] = {
    **{f"llama_{name}": partial(make_llama, name) for name in CASES},
    "llama_nf4": make_llama_nf4,
    "llama_int8": make_llama_int8,
    "peft": make_peft,
    "vocab": make_vocab,
    "peft_vocab": make_peft_vocab,
    "dora": make_dora,
    "pissa": make_pissa,
    "loftq": make_loftq,
    "nf4_extra": make_nf4_extra,
    "adamw8bit": make_adamw8bit,
    "optimizers": make_optimizers,
    "schedules": make_schedules,
    "randperm": make_randperm,
    "stories": make_stories,
    "masks": make_masks,
}


def main() -> int:
    """Run the makers named on the command line, or all of them.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Make the golden files of the tests.")
    parser.add_argument("--only", action="append", metavar="NAME", help="make this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(MAKERS))
        return 0
    names = options.only or list(MAKERS)
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        parser.error(f"unknown name {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    for name in names:
        start = time.monotonic()
        print(name)
        one_thread()
        MAKERS[name]()
        print(f"  {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
