"""Which tokens of conversations are answers, as transformers finds them with `{% generation %}` blocks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import golden_stories
from golden_common import GOLDEN_DIR, save_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SPECIAL = [
    *(BOS, EOS, "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
N_SHARED = 120

_TURN = "{% for m in messages %}{% set said = m['content'] SEEN + 'END' %}{{ 'OPEN' }}"
_ANSWER = (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ said }}{% endgeneration %}"
    "{% else %}{{ said }}{% endif %}{{ 'AFTER' }}{% endfor %}"
)


def _template(start: str, seen: str, opening: str, end: str, after: str) -> str:
    """One template; only what differs between the formats is written out."""
    body = _TURN.replace("SEEN", seen).replace("END", end).replace("{{ 'OPEN' }}", "{{ " + opening + " }}")
    return start + body + _ANSWER.replace("AFTER", after)


# As the model cards of these families describe their formats, with the answers marked.
TEMPLATES = {
    "chatml": _template("", "", "'<|im_start|>' + m['role'] + '\\n'", "<|im_end|>", "\\n"),
    "phi-3": _template("", "", "'<|' + m['role'] + '|>\\n'", "<|end|>", "\\n"),
    "llama-3.1": _template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n"
        "Today Date: 26 July 2024\\n\\n' + system + '<|eot_id|>' }}",
        "| trim",
        "'<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else m['role']) + '<|end_header_id|>\\n\\n'",
        "<|eot_id|>",
        "",
    ),
    "gemma": _template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] | trim + '\\n\\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}",
        "| trim",
        "'<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n'"
        " + (system if loop.first else '')",
        "<end_of_turn>",
        "\\n",
    ),
}

# ShareGPT rows of ours: several turns, code, accents, blanks at the ends, markers' words in the text, an empty answer.
ROWS: list[list[tuple[str, str]]] = [
    [("human", "Hi"), ("gpt", "Hello! How can I help?")],
    [("system", " Be brief. "), ("human", "Capital of Norway?"), ("gpt", "Oslo."), ("human", "Sure?"), ("gpt", "Yes.")],
    [("human", "Say assistant\n"), ("gpt", "assistant\n\nuser\n"), ("human", "model?"), ("gpt", "user: no")],
    [("human", "Grüße 🙂 ¿qué?"), ("gpt", "  déjà vu\n")],
    [("human", "code"), ("gpt", "```python\nfor i in range(3):\n    print(i)\n```\n\n- a\n- b")],
    [("human", "1"), ("gpt", ""), ("human", "2"), ("gpt", "\n\nb")],
    [("system", "s"), ("human", "### Instruction:\nx"), ("gpt", "### Response:\ny\n\n### Instruction:\nz")],
]
TOOL_ROWS: list[list[tuple[str, str]]] = [
    [
        ("human", "Weather?"),
        ("function_call", '{"name": "weather"}'),
        ("observation", '{"temp": 21.5}'),
        ("gpt", "Warm.\n"),
        ("human", "Thanks"),
        ("gpt", "Welcome"),
    ],
]
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "system": "system"}


def small_tokenizer() -> Tokenizer:
    """Return a byte-level BPE with a few merges, learned from the rows."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [text for row in [*ROWS, *TOOL_ROWS] for _, text in row for _ in range(2)]
    tokenizer.train_from_iterator([*texts, "\n\n", "\n\n", "user\n", "assistant\n", "user\n"], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def gpt2_tokenizer(data: Path) -> Tokenizer:
    """Return GPT-2's vocabulary with the formats' tokens behind it, and a pad token between."""
    folder = data / "tokenizers/gpt2"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>", *SPECIAL])
    return tokenizer


def masks(tokenizer: Tokenizer, template: str, talks: list[list[dict[str, str]]]) -> list[tuple[list[int], list[int]]]:
    """Return ids and mask of each conversation."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        loaded: Any = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", bos_token=BOS, eos_token=EOS)
    loaded.chat_template = template
    made = []
    for talk in talks:
        row = loaded.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        made.append((list(row["input_ids"]), list(row["assistant_masks"])))
    return made


def as_messages(row: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return a ShareGPT row as templates take it."""
    return [{"role": ROLES[role], "content": text} for role, text in row]


def shared_rows(data: Path, name: str) -> list[list[tuple[str, str]]]:
    """Return the first rows of the ShareGPT set; for Gemma, which has no place for tools, those without."""
    text = (data / "instruct/llamafactory_glaive_toolcall_en_demo.json").read_text(encoding="utf-8")
    rows = [[(turn["from"], turn["value"]) for turn in entry["conversations"]] for entry in json.loads(text)]
    if name == "gemma":
        rows = [row for row in rows if [role for role, _ in row] == ["human", "gpt"] * (len(row) // 2)]
    return rows[:N_SHARED]


def make_masks() -> None:
    """Write the tokenizer and the masks."""
    small = small_tokenizer()
    folder = GOLDEN_DIR / "masks_tokenizer"
    folder.mkdir(exist_ok=True)
    small.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    content: dict[str, Any] = {"templates": {}, "special": SPECIAL}
    data = golden_stories.shared_data()
    for name, template in TEMPLATES.items():
        rows = ROWS if name == "gemma" else [*ROWS, *TOOL_ROWS]
        made = masks(small, template, [as_messages(row) for row in rows])
        talks = [[{"from": role, "value": text} for role, text in row] for row in rows]
        shared = masks(gpt2_tokenizer(data), template, [as_messages(row) for row in shared_rows(data, name)])
        content["templates"][name] = {
            "template": template,
            "rows": [
                {"conversations": talk, "input_ids": ids, "mask": "".join(map(str, mask))}
                for talk, (ids, mask) in zip(talks, made, strict=True)
            ],
            # Of the test material only sums: each id and each mask times its position, from 1.
            "shared_ids": [sum(i * at for at, i in enumerate(ids, 1)) for ids, _ in shared],
            "shared_masks": [sum(i * at for at, i in enumerate(mask, 1)) for _, mask in shared],
        }
    save_json(GOLDEN_DIR / "masks.json", content)
