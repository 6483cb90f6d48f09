"""Where a checkpoint lies: the embedded one, a folder, or a repository of the Hugging Face hub."""
from pathlib import Path

from checkpoint.config import check_files

EMBEDDED = Path(__file__).resolve().parent.parent / "tiny"
SHORT = {  # short names of checkpoints on the hub
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
NEEDED = [  # files to download: some repositories hold all weights twice
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]


def resolve(checkpoint=None, revision=None):
    """Folder of a checkpoint; one of the hub is downloaded once.

    checkpoint  a folder, a short name or a hub id; None is the embedded one
    revision    branch, tag or commit of the hub's repository
    raises      ValueError: none of these; no folder inside one that exists; a revision of a
                folder; the hub refuses it, or cannot be reached and its cache does not hold it
    """
    folder = EMBEDDED if checkpoint is None else Path(checkpoint)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} needs a checkpoint of the hub, "
                             f"{folder} is a folder")
        check_files(folder)
        return folder
    repo = SHORT.get(str(checkpoint).lower(), str(checkpoint))
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise ValueError(f"checkpoint {str(checkpoint)!r} is no folder, no hub id (owner/name) "
                         f"and none of: {', '.join(SHORT)}")
    if revision is None and "/" in str(folder) and folder.parent.is_dir():
        raise ValueError(f"{folder} is no folder, though {folder.parent} is: correct the name "
                         "(for a repository of the hub of that name add --revision main)")
    return _download(repo, revision)


def _download(repo, revision):
    """Folder of a repository in the hub's cache. raises ValueError that says what to do."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=NEEDED))
    except errors.GatedRepoError:
        raise ValueError(f"{repo} is gated: ask for access on https://huggingface.co/{repo}, "
                         "then set HF_TOKEN to a token of that account "
                         "(https://huggingface.co/settings/tokens)") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo} "
                         "(or it is private: set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {revision!r}: "
                         f"see https://huggingface.co/{repo}/tree/main") from None
    except errors.LocalEntryNotFoundError:  # or some of its files: texts would be others
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(f"{repo}{at} is not, or not whole, in the hub's cache, and the hub cannot "
                         "be reached: download it with a connection once, or give a folder"
                         ) from None
    except Exception as error:  # whatever its HTTP library raises, too
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot download {repo}: {reason.splitlines()[0]}") from None
