"""Checkpoints by name: a folder here, or a repository on the Hub."""

from pathlib import Path

from flax_vlm.checkpoint import CONFIG, CONVERSION, PARAMS, PROCESSOR_FILES, is_native

_NEEDED = (CONFIG, CONVERSION, *PROCESSOR_FILES, f"{PARAMS}/*")


def local_folder(path: str | Path) -> Path:
    """`path`, or the local copy of a repository on the Hub, of which no more is fetched than is read.

    Without a network, or with HF_HUB_OFFLINE set, what was fetched before is taken.

    Raises:
      ValueError: for what is neither a folder nor the name of a repository.
      OSError: for a repository that cannot be fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ValueError(
            f"{path}: expected the folder of a checkpoint, or a repository of the Hub such as BAAI/AltCLIP"
        )
    from huggingface_hub import snapshot_download

    # Repositories often hold the weights twice: .bin files are fetched only where there are no safetensors.
    for weights in ("*.safetensors", "*.bin"):
        folder = Path(snapshot_download(str(path), allow_patterns=[*_NEEDED, weights, f"{weights}.index.json"]))
        if any(folder.glob(weights)) or is_native(folder):
            break
    return folder
