"""Checkpoints of the Hugging Face hub: its cache, revisions, short names, refusals. No network."""
import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import huggingface_hub
import pytest
from calling import ROOT, check_error, result_of, run
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from make_golden import INST
from reference import make_folder

from checkpoint.config import ModelConfig
from checkpoint.hub import NEEDED, SHORT, resolve

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
COMMIT = "f" * 40
OLDER = "0" * 40


def fill_hub_cache(home, repo, source, commit, ref):
    """Files of a folder in the layout of the hub's cache: blobs by hash, links to them in a
    snapshot, names of commits in refs."""
    top = home / "hub" / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "refs" / ref).write_text(commit)
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (top / "blobs" / digest).write_bytes(file.read_bytes())
        (top / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{digest}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with TinyLlama (two versions of it) and SmolLM2, of random weights."""
    base = tmp_path_factory.mktemp("hub")
    smollm = SHORT["smollm2-135m"]
    for repo, commit, ref, layers in (
            (TINYLLAMA, COMMIT, "main", 2), (TINYLLAMA, OLDER, "v0", 1),
            (smollm, COMMIT, "main", 3)):
        source = make_folder(base / f"{layers} layers", num_hidden_layers=layers)
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": INST}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        fill_hub_cache(base / "home", repo, source, commit, ref)
    return base / "home"


def program(hub, offline, *args):
    """generate.py in a process with that cache; HF_HUB_OFFLINE, or an address nobody listens at."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(hub), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, str(ROOT / "generate.py"), *map(str, args)],
                          capture_output=True, text=True, timeout=300, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("offline", (True, False), ids=("HF_HUB_OFFLINE", "no network"))
def test_a_cached_checkpoint_works_offline(hub, offline):
    """As a user runs it. Guards against a program that asks the network for what it has."""
    code, out, err = program(hub, offline, "--checkpoint", TINYLLAMA, "--chat", "--prompt", "Hi",
                             "--max-new-tokens", 4, "--temperature", 0, "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["prompt_tokens"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("offline", (True, False), ids=("HF_HUB_OFFLINE", "no network"))
def test_a_checkpoint_that_is_not_cached_gets_one_line(hub, offline):
    """Guards against the HTTP library's own messages."""
    result = program(hub, offline, "--checkpoint", "falcon-7b", "--max-new-tokens", 2)
    check_error(result, "tiiuae/falcon-7b", "cache")


def test_revisions_and_short_names_find_their_snapshot(hub, monkeypatch):
    """Guards against a revision that is parsed and then ignored, and a short name that points
    elsewhere."""
    local = partial(huggingface_hub.snapshot_download, cache_dir=hub / "hub",
                    local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)

    def layers(*args):
        return ModelConfig.from_folder(resolve(*args)).n_layers

    def full_bytes(*args):
        result = result_of("--checkpoint", "tinyllama", "--max-new-tokens", 2, *args)
        return result["kv_bytes_full"]

    newest = (TINYLLAMA,), ("tinyllama",), ("TinyLlama", "main"), (TINYLLAMA, COMMIT)
    assert [layers(*args) for args in newest] == [2, 2, 2, 2]
    assert layers(TINYLLAMA, "v0") == layers("tinyllama", OLDER) == 1
    assert layers("smollm2-135m") == 3
    with pytest.raises(ValueError, match="v9.*cache"):
        layers(TINYLLAMA, "v9")
    assert full_bytes() == 2 * full_bytes("--revision", "v0")


@pytest.mark.parametrize("kind, named", (
    ("GatedRepoError", ("meta-llama/Llama-2-7b-hf", "HF_TOKEN",
                        "https://huggingface.co/meta-llama/Llama-2-7b-hf")),
    ("RepositoryNotFoundError", ("no repository", "HF_TOKEN")),
    ("RevisionNotFoundError", ("revision 'v9'",)),
    ("HfHubHTTPError", ("meta-llama/Llama-2-7b-hf", "refused")),
    (None, ("meta-llama/Llama-2-7b-hf", "broken pipe")),
))
def test_what_the_hub_answers_becomes_one_line(kind, named, monkeypatch):
    """Guards against a gated model whose message does not say how to get in, and against errors of
    the HTTP library as tracebacks."""
    def refuse(*args, **options):
        if kind is None:
            raise RuntimeError("broken pipe")
        raise getattr(errors, kind)("refused\nsecond line", response=Mock(headers={}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    check_error(run("--checkpoint", "llama-2-7b", "--revision", "v9"), *named)


def test_half_a_download_is_refused_offline(tmp_path, monkeypatch):
    """Guards against a text without the files that were still to come: other end tokens, no chat
    template."""
    half = errors.IncompleteSnapshotError("files are missing", snapshot_path=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=half))
    check_error(run("--checkpoint", "llama-2-7b"), "meta-llama/Llama-2-7b-hf", "not whole")


def test_only_needed_files_are_downloaded():
    """Guards against repositories that hold their weights twice (consolidated.safetensors, .bin,
    original/)."""
    wanted = [
        "config.json", "generation_config.json", "model.safetensors",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja"]
    others = [
        "consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
        "original/consolidated.00.pth", "README.md", "tokenizer.model", "onnx/model.onnx",
        "model.gguf", "adapter_model.safetensors", "modeling_falcon.py"]
    kept = filter_repo_objects(wanted + others, allow_patterns=NEEDED)
    assert sorted(kept) == sorted(wanted)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    """Guards against a pin that is silently without effect."""
    result = run("--checkpoint", make_folder(tmp_path), "--revision", "main")
    check_error(result, "revision 'main'", str(tmp_path))
    check_error(run("--revision", "main"), "revision 'main'")


def test_a_mistyped_folder_is_called_missing(tmp_path, monkeypatch):
    """One slash makes no hub id of it where its first part is a folder here. Guards against a name
    that is looked up on the hub; with a revision it is."""
    asked = []

    def download(repo, revision, **options):
        asked.append((repo, revision))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "file").touch()
    for name in ("models/lama", "models/file"):
        check_error(run("--checkpoint", name), name, "is no folder", "models is")
    assert not asked
    resolve("models/lama", "main")
    resolve("other/lama")
    assert asked == [("models/lama", "main"), ("other/lama", None)]
    assert resolve("models/llama").samefile(tmp_path / "models" / "llama")
