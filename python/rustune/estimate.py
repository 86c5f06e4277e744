"""What a training run needs: memory from the shape of a model, time from one layer of it tried out on this machine."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rustune import _native
from rustune._native import ConfigError, HubError, ModelError

# The layer that is tried out has no more weights than this, and the trial no more tokens.
_TRIAL_WEIGHTS: Final = 64_000_000
_TRIAL_TOKENS: Final = 512
_TIMEOUT_SECONDS: Final = 20

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        hidden: Width of the residual stream.
        ffn: Width of the MLP.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Number of tokens.
        tied: Whether the head is the embedding table.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Shape:
        """Reads the sizes.

        Args:
            config: A `config.json`.

        Returns:
            The shape.

        Raises:
            ModelError: If a size is missing or makes no sense.
        """

        def size(name: str, default: Any = None) -> int:
            value = config.get(name, default)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"config.json: {name} = {value!r}: expected a whole number, at least 1")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return Shape(
            hidden=hidden,
            ffn=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", max(hidden // heads, 1)),
            vocab=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: name to outputs and inputs."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def n_linear(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def n_tables(self) -> int:
        """Weights of the embedding table and the head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def n_parameters(self) -> int:
        """All weights."""
        return self.layers * (self.n_linear + 2 * self.hidden) + self.hidden + self.n_tables

    def n_adapter(self, rank: int, targets: Iterable[str] = LINEARS) -> int:
        """Counts the trained numbers of an adapter.

        Args:
            rank: Its rank.
            targets: Names of linear layers.

        Returns:
            Their number.
        """
        return self.layers * rank * sum(sum(self.linears[name]) for name in targets)

    def n_whole(self, modules: Iterable[str]) -> int:
        """Counts the trained numbers of modules that are trained whole.

        Args:
            modules: `embed_tokens` and `lm_head`, either or both.

        Returns:
            Their number.
        """
        return self.vocab * self.hidden * len(set(modules))


def memory(
    config: Mapping[str, Any],
    *,
    tokens: int,
    rank: int = 16,
    modules_to_save: Iterable[str] = (),
    bits: int = 4,
    optim: str = "adamw_8bit",
    checkpointing: str = "unsloth",
) -> dict[str, Any]:
    """Estimates the memory of training, from a config alone.

    Args:
        config: A `config.json`.
        tokens: Tokens of the largest micro-batch: its rows times their length.
        rank: The adapter's rank, on all linear layers.
        modules_to_save: What is trained whole beside it, as of `get_peft_model`.
        bits: In how many bits the linear layers are held: 4, 8 or 16.
        optim: The optimizer, as transformers spells it.
        checkpointing: `true` runs every layer again, `false` keeps all, `unsloth` keeps what there is memory for.

    Returns:
        `peak`, `available` and `fits`, and in `estimate` the bytes by what they are for and the layers kept, kept in
        part and run again.

    Raises:
        ModelError: If the config describes no model that can be run.
        ConfigError: If the optimizer is not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        quantization = {f"load_in_{bits}bit": True}
        made: dict[str, Any] = json.loads(
            _native.estimate_memory(
                folder,
                json.dumps(quantization),
                json.dumps({"r": rank, "modules_to_save": list(modules_to_save)}),
                tokens,
                optim=optim,
                checkpointing=checkpointing,
            )
        )
    return made


def flops(shape: Shape, *, tokens: int, length: int, again: float, head_trained: bool = False) -> float:
    """Counts the floating point operations of a forward and backward with frozen linear layers.

    Args:
        shape: The model's sizes.
        tokens: Tokens in all.
        length: Tokens of a row: attention costs more the longer rows are.
        again: Layers that the backward runs again.
        head_trained: Whether the head gets a gradient of its own.

    Returns:
        Additions and multiplications: 2 for each weight and token in the forward, as many for the gradient of the
        input, and as many again in a layer that is run anew; the head is read once for the logits and once for their
        gradient.
    """
    linear = 2.0 * shape.n_linear * (2 * shape.layers + again)
    # Scores and values, half of them masked; the backward has five such products to the forward's two.
    attention = 2.0 * length * shape.heads * shape.head_dim * (3.5 * shape.layers + again)
    head = (6.0 if head_trained else 4.0) * shape.vocab * shape.hidden
    return tokens * (linear + attention + head)


def measure(shape: Shape, *, tokens: int = _TRIAL_TOKENS, rank: int = 16, bits: int = 4) -> float:
    """Trains one layer of a model's shape, with made-up weights, and times it.

    A layer of more than 64 million weights is made smaller. It takes a few seconds, and some 130 MB of temporary files.

    Args:
        shape: The model's sizes.
        tokens: Tokens of the trial, 512 at most.
        rank: The adapter's rank.
        bits: In how many bits the linear layers are held: 4, 8 or 16.

    Returns:
        Floating point operations a second, as `flops` counts them.
    """
    from rustune import FastLanguageModel, SFTConfig, SFTTrainer, TrainerCallback

    trial = _trial_shape(shape)
    length = max(min(tokens, _TRIAL_TOKENS), 8)
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        _write_trial(Path(folder), trial)
        loaded = _load_quietly(FastLanguageModel, Path(folder), length, bits)
        model = FastLanguageModel.get_peft_model(loaded, r=rank)
        rows = [{"input_ids": [(3 * i) % trial.vocab for i in range(length)]}]
        args = SFTConfig(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        SFTTrainer(model, args, train_dataset=rows, callbacks=[Clock()]).train()
    # The first step also fills caches and buffers.
    seconds = min(end - begin for begin, end in zip(marks[2::2], marks[3::2], strict=True))
    return flops(trial, tokens=length, length=length, again=0) / max(seconds, 1e-9)


def read_config(name: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Reads a model's `config.json`, and nothing else of it.

    Args:
        name: A folder, the folder of an adapter, or a hub name, whose config is taken from the cache or the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        The parsed file.

    Raises:
        HubError: If the hub does not have it, does not give it, or cannot be reached.
        ModelError: If it is not JSON.
        FileNotFoundError: If the folder has none.
    """
    where = os.fspath(name)
    if os.path.isdir(where):
        adapter = Path(where) / "adapter_config.json"
        if adapter.is_file() and not (Path(where) / "config.json").is_file():
            base = _parsed(adapter.read_text(encoding="utf-8"), adapter).get("base_model_name_or_path")
            if not isinstance(base, str) or not base or base == where:
                raise ModelError(f"{adapter}: base_model_name_or_path: expected the base model's name or folder")
            return read_config(base)
        path = Path(where) / "config.json"
        return _parsed(path.read_text(encoding="utf-8"), path)
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise FileNotFoundError(2, "No such model folder", where)
    cached = _cached(where, revision or "main")
    if cached is not None:
        return _parsed(cached.read_text(encoding="utf-8"), cached)
    return _parsed(_download(where, revision or "main"), f"{where}/config.json")


def _trial_shape(shape: Shape) -> Shape:
    """One layer of a shape, not too large, with a small vocabulary."""
    trial = replace(shape, layers=1, vocab=512, tied=True)
    while trial.n_linear > _TRIAL_WEIGHTS:
        heads = max(trial.heads // 2, 1)
        trial = replace(
            trial,
            hidden=max(trial.hidden // 2 // 64 * 64, 64),
            ffn=max(trial.ffn // 2 // 64 * 64, 64),
            heads=heads,
            kv_heads=max(math.gcd(heads, trial.kv_heads), 1),
        )
    return trial


def _write_trial(folder: Path, shape: Shape) -> None:
    """Writes a model with made-up bfloat16 weights."""
    import numpy as np

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # One stretch of random numbers serves all tensors: drawing millions would take longer than the trial.
    noise = np.random.default_rng(0).normal(0.0, 0.02, 1 << 20).astype(np.float32).view(np.uint32) >> 16
    one = np.float32(1.0).view(np.uint32) >> 16
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    parents = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.{parents[name]}.{name}.weight": sizes for name, sizes in shape.linears.items()}
        tensors |= {f"{at}.{norm}.weight": (shape.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    tensors["model.norm.weight"] = (shape.hidden,)
    header: dict[str, Any] = {}
    end = 0
    for name, sizes in tensors.items():
        begin, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in tensors.items():
            n = math.prod(sizes)
            values = np.full(n, one) if name.endswith("norm.weight") else np.resize(noise, n)
            file.write(values.astype("<u2").tobytes())


def _load_quietly(loader: Any, folder: Path, length: int, bits: int) -> Any:
    """Loads the trial model, which has no tokenizer: that needs no warning."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = loader.from_pretrained(
            folder, length, **{f"load_in_{bits}bit": True}, use_gradient_checkpointing=False
        )
    return model


def _parsed(text: str, where: object) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{where}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{where}: expected an object, got {type(config).__name__}")
    return config


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _cached(name: str, revision: str) -> Path | None:
    """The config in the hub's cache, if it is there."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser()
    folder = cache / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirections, without the token when they lead to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Makes the next request."""
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            made.remove_header("Authorization")
        return made


def _download(name: str, revision: str) -> str:
    """The config from the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError(f"{name}: there is no such folder, it is not in the cache, and HF_HUB_OFFLINE is set")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"HF_ENDPOINT = {endpoint}: expected an address that begins with http:// or https://")
    request = urllib.request.Request(
        f"{endpoint}/{urllib.parse.quote(name)}/resolve/{urllib.parse.quote(revision, safe='')}/config.json"
    )
    kept = _home() / "token"
    token = os.environ.get("HF_TOKEN") or (kept.read_text(encoding="utf-8").strip() if kept.is_file() else "")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=_TIMEOUT_SECONDS) as answer:
            text: str = answer.read(1 << 24).decode("utf-8")
            return text
    except urllib.error.HTTPError as error:
        error.close()
        why = {
            401: "no such model, or access is refused: set HF_TOKEN",
            403: "access is refused: ask for it on the model's page and set HF_TOKEN",
            404: f"no such model, no revision {revision} of it, or no config.json in it",
        }.get(error.code, f"{endpoint} answered {error.code}")
        raise HubError(f"{name}: {why}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "reason", error)
        raise HubError(f"{name}: {endpoint} cannot be reached ({reason}); give the path of a folder") from None
