"""Uploading to a hub of our own, which listens on this machine and misbehaves on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny

from rustune import ConfigError, FastLanguageModel, HubError, Model, SFTConfig, SFTTrainer, hub

TOKEN = "hf_secretsecretsecret"


class Request(NamedTuple):
    at: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Answer = tuple[int, dict[str, str], Any]
Override = Callable[[Request, int], Answer | None]


class FakeHub:
    """A hub, and a store for large files on a port of its own; keeps what was committed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.override: Override = lambda request, before: None
        self.chunk_size = 0
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.header: dict[str, Any] = {}
        self.servers = [self._server("hub"), self._server("store")]
        self.endpoint, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def _server(self, at: str) -> ThreadingHTTPServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(at, self.command, self.path, headers, body)
                before = sum(r[:3] == request[:3] for r in outer.requests)
                outer.requests.append(request)
                status, extra, answer = outer.override(request, before) or outer.answer(request)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**extra, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_any

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def answer(self, request: Request) -> Answer:
        path = request.path.partition("?")[0]
        if request.at == "store":
            key = path.removeprefix("/put/")
            self.stored[key] = request.body
            return 200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}, b""
        if path == "/api/repos/create":
            name = json.loads(request.body)["name"]
            owner = json.loads(request.body)["organization"] or "someone"
            return 200, {}, {"url": f"{self.endpoint}/{owner}/{name}", "name": f"{owner}/{name}"}
        if "/preupload/" in path:
            listed = json.loads(request.body)["files"]
            assert all(len(base64.b64decode(file["sample"])) == min(file["size"], 512) for file in listed)
            modes = {True: "lfs", False: "regular"}
            return (
                200,
                {},
                {"files": [{"path": f["path"], "uploadMode": modes[".safe" in f["path"]]} for f in listed]},
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {}, {"objects": [self._action(entry) for entry in json.loads(request.body)["objects"]]}
        if path == "/verify":
            return 200, {}, {}
        if path.startswith("/complete/"):
            oid = path.removeprefix("/complete/")
            parts = json.loads(request.body)["parts"]
            chunks = [self.stored[f"{oid}/{part['partNumber']}"] for part in parts]
            assert all(
                part["etag"] == f'"{hashlib.md5(chunk).hexdigest()}"' for part, chunk in zip(parts, chunks, strict=True)
            )
            self.stored[oid] = b"".join(chunks)
            return 200, {}, {}
        if "/commit/" in path:
            for line in request.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.header = value
                elif entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    content = self.stored[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                    self.files[value["path"]] = content
            return 200, {}, {"commitUrl": f"{self.endpoint}/commit/1", "pullRequestUrl": f"{self.endpoint}/pull/1"}
        return 404, {}, {"error": "no such page"}

    def _action(self, entry: dict[str, Any]) -> dict[str, Any]:
        oid, size = entry["oid"], entry["size"]
        verify = {"href": f"{self.endpoint}/verify"}
        if not self.chunk_size:
            upload = {"href": f"{self.store}/put/{oid}?signature=x", "header": {"X-Signed": "yes"}}
        else:
            parts = {
                str(n + 1): f"{self.store}/put/{oid}/{n + 1}" for n in reversed(range(-(-size // self.chunk_size)))
            }
            header = {"chunk_size": str(self.chunk_size), **parts}
            upload = {"href": f"{self.endpoint}/complete/{oid}", "header": header}
        return {**entry, "actions": {"upload": upload, "verify": verify}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    made = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.001)
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny.write_model(tmp_path_factory.mktemp("llama"))
    return FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(str(folder), 64)[0], r=4)


@pytest.mark.parametrize("chunk_size", [0, 7000])
def test_an_adapter_arrives_as_save_pretrained_writes_it(
    fake: FakeHub, model: Model, tmp_path: Path, chunk_size: int
) -> None:
    fake.chunk_size = chunk_size
    assert model.push_to_hub("owner/adapter", private=True, commit_message="First") == f"{fake.endpoint}/commit/1"
    model.save_pretrained(tmp_path / "adapter")
    assert fake.files == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in fake.files and fake.header["summary"] == "First"
    created = json.loads(fake.requests[0].body)
    assert created == {"name": "adapter", "organization": "owner", "type": "model", "private": True}
    # What was uploaded is an adapter again.
    for name, content in fake.files.items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    assert FastLanguageModel.from_pretrained(str(tmp_path / "back"), 64)[0].adapter is not None


def test_a_tokenizer_arrives_under_a_name_alone(fake: FakeHub, model: Model) -> None:
    model.tokenizer.push_to_hub("words", create_pr=True)
    assert "tokenizer.json" in fake.files
    assert any(request.path == "/api/models/someone/words/commit/main?create_pr=1" for request in fake.requests)


def test_an_adapter_and_its_tokenizer_go_together(fake: FakeHub, model: Model, tmp_path: Path) -> None:
    model.push_to_hub_merged("owner/both", model.tokenizer, save_method="lora")
    assert {"adapter_config.json", "tokenizer.json"} <= set(fake.files)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert any("/api/models/someone/mine/commit/" in request.path for request in fake.requests)


def test_a_trainer_uploads_what_it_made(fake: FakeHub, model: Model, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "output_dir": str(tmp_path / "run"), "save_strategy": "no", "disable_tqdm": True}
    args = SFTConfig(**settings, push_to_hub=True, hub_model_id="owner/run", hub_private_repo=True)
    trainer = SFTTrainer(model, args, train_dataset=tiny.rows())
    trainer.train()
    assert {"adapter_model.safetensors", "tokenizer.json"} <= set(fake.files)
    assert json.loads(fake.requests[0].body)["private"] is True and fake.header["summary"] == "End of training"
    assert trainer.push_to_hub("Again") == f"{fake.endpoint}/commit/1" and fake.header["summary"] == "Again"
    SFTTrainer(model, SFTConfig(**settings), train_dataset=tiny.rows()).push_to_hub()
    assert any("/api/models/someone/run/commit/" in request.path for request in fake.requests)


@pytest.mark.parametrize(
    ("strategy", "folders", "n_commits"),
    [
        ("end", set(), 1),
        ("every_save", set(), 3),
        ("checkpoint", {"last-checkpoint"}, 5),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}, 5),
    ],
)
def test_checkpoints_go_along_as_the_strategy_says(
    fake: FakeHub, model: Model, tmp_path: Path, strategy: str, folders: set[str], n_commits: int
) -> None:
    settings = {"max_steps": 2, "save_steps": 1, "output_dir": str(tmp_path / "run"), "disable_tqdm": True}
    args = SFTConfig(
        **settings, push_to_hub=True, hub_strategy=strategy, hub_revision="trial", hub_model_id="owner/run"
    )
    SFTTrainer(model, args, train_dataset=tiny.rows()).train()
    assert {name.rpartition("/")[0] for name in fake.files} - {""} == folders
    assert "adapter_model.safetensors" in fake.files and fake.header["summary"] == "End of training"
    commits = [request for request in fake.requests if "/commit/" in request.path]
    assert len(commits) == n_commits and all(request.path.endswith("/commit/trial") for request in commits)
    titles = [json.loads(request.body.splitlines()[0])["value"]["summary"] for request in commits]
    if strategy in ("checkpoint", "all_checkpoints"):
        assert titles[2:4] == ["Training in progress, step 2", "Training in progress, step 2, checkpoint"]
    # A checkpoint that came back from the hub can be gone on from.
    for folder in folders:
        there = {Path(name).name: content for name, content in fake.files.items() if name.startswith(f"{folder}/")}
        here = tmp_path / "run" / ("checkpoint-2" if folder == "last-checkpoint" else folder)
        assert there == {path.name: path.read_bytes() for path in here.iterdir()}
        for name, content in there.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
        settings |= {"max_steps": 3, "output_dir": str(tmp_path / "again")}
        again = SFTTrainer(model, SFTConfig(**settings), train_dataset=tiny.rows())
        assert again.train(resume_from_checkpoint=str(tmp_path / folder)).global_step == 3


@pytest.mark.parametrize("status", [302, 307])
def test_the_token_goes_to_the_hub_and_nowhere_else(fake: FakeHub, model: Model, status: int) -> None:
    model.push_to_hub("owner/adapter")
    for request in fake.requests:
        assert (request.headers.get("authorization") == f"Bearer {TOKEN}") == (request.at == "hub")
    puts = [request for request in fake.requests if request.at == "store"]
    assert puts and all(request.headers["x-signed"] == "yes" for request in puts)

    # Nor along with a redirect.
    n_before = len(fake.requests)
    fake.override = lambda request, before: (
        (status, {"Location": f"{fake.store}/elsewhere"}, b"") if request.path == "/api/repos/create" else None
    )
    with pytest.raises(HubError, match=f"HTTP {status}"):
        model.push_to_hub("owner/adapter")
    assert all(request.at == "hub" for request in fake.requests[n_before:])


def test_what_fails_for_a_moment_is_tried_again(fake: FakeHub, model: Model) -> None:
    fake.override = lambda request, before: (
        (503, {}, b"busy") if before < 2 and "/commit/" not in request.path else None
    )
    model.push_to_hub("owner/adapter")
    assert "adapter_model.safetensors" in fake.files


def test_a_commit_is_not_made_twice(fake: FakeHub, model: Model) -> None:
    fake.override = lambda request, before: (502, {}, b"lost") if "/commit/" in request.path else None
    with pytest.raises(HubError, match="HTTP 502"):
        model.push_to_hub("owner/adapter")
    assert sum("/commit/" in request.path for request in fake.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, {"error": f"bad token {TOKEN}"}), "the token was refused"),
        ((403, {}, {"error": "read only"}), r"may not write there.*read only"),
        ((404, {}, b"<html>"), "no such repository"),
        ((500, {}, b""), "HTTP 500"),
        ((200, {}, b"<html>hello"), "did not answer as a hub does"),
    ],
)
def test_what_the_hub_refuses_is_said_without_the_token(
    fake: FakeHub, model: Model, answer: Answer, message: str
) -> None:
    fake.override = lambda request, before: answer
    with pytest.raises(HubError, match=message) as caught:
        model.push_to_hub("owner/adapter")
    assert TOKEN not in str(caught.value) and "owner/adapter" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        ("preupload", {"files": [3]}),
        ("objects/batch", {}),
        ("objects/batch", {"objects": [{"oid": "another"}]}),
        ("objects/batch", {"objects": "none"}),
    ],
)
def test_nonsense_from_the_hub_is_a_hub_error(fake: FakeHub, model: Model, part: str, answer: Any) -> None:
    fake.override = lambda request, before: (200, {}, answer) if part in request.path else None
    with pytest.raises(HubError, match="did not answer as a hub does"):
        model.push_to_hub("owner/adapter")
    assert not fake.files


def test_without_a_hub_or_a_token_nothing_is_sent(
    fake: FakeHub, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for bad in ("a/b/c", "", "owner/", "sp ace", "../x"):
        with pytest.raises(ConfigError, match="repo_id"):
            model.push_to_hub(bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        model.push_to_hub("owner/adapter")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="set HF_TOKEN"):
        model.push_to_hub("owner/adapter")
    assert fake.requests == []
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(f"{TOKEN}\n")
    model.push_to_hub("owner/adapter")
    with pytest.warns(UserWarning, match="set HF_TOKEN") as caught:
        model.push_to_hub("owner/adapter", token=TOKEN)
    assert TOKEN not in str(caught[0].message)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        model.push_to_hub("owner/adapter")


def test_unknown_arguments_are_refused_before_anything_is_sent(fake: FakeHub, model: Model) -> None:
    with pytest.raises(ConfigError, match="did you mean private"):
        model.push_to_hub("owner/adapter", privat=True)
    assert fake.requests == []
