"""What other programs save, and how to recognise it."""

from pathlib import Path

from checkpoint.save import FILE

# The suffix of a file -> what it is. The order matters: the first that a folder has names it.
FILES = {
    ".safetensors": "a safetensors file",
    ".pt": "a file of torch.save, such as nanoGPT's ckpt.pt",
    ".pth": "a file of torch.save",
    ".ckpt": "a file of torch.save",
    ".gguf": "a GGUF file",
    ".bin": "a file of torch.save, or of tokens",
}
# A file in a folder -> what the folder is. Here, too, the first that a folder has names it.
FOLDERS = {
    "zero_to_fp32.py": "a checkpoint of DeepSpeed",
    "ckpt.pt": "a run of nanoGPT",
    ".metadata": "a checkpoint of torch.distributed.checkpoint",
    "pytorch_model.bin": "a model of Hugging Face",
    "pytorch_model.bin.index.json": "a model of Hugging Face",
    "model.safetensors": "a model of Hugging Face",
    "model.safetensors.index.json": "a model of Hugging Face",
    "adapter_config.json": "a model of Hugging Face",
}


def foreign(path: Path) -> str:
    """What is at `path`, as the middle of a sentence; "" unless it is known to be no checkpoint."""
    if path.is_file() and (FILE.fullmatch(path.name) or path.name == "index.json"):
        return f"is a part of the checkpoint {path.parent}"
    what = None
    if path.is_file():
        what = FILES.get(path.suffix)
    elif path.is_dir():
        what = kind_of_folder({p.name for p in path.iterdir()})
    if not what:
        return ""
    return (
        f"is {what}, which --resume= does not read, and --init_from= only as a folder of Hugging "
        "Face (config.json, safetensors), nanoGPT's ckpt.pt or our own export"
    )


def kind_of_folder(names: set[str]) -> str | None:
    """What a folder with files of these names is, if another program has written it."""
    for name, what in FOLDERS.items():
        if name in names:
            return what
    # No file tells which program wrote the folder. The kind of some file in it still helps.
    suffixes = {Path(name).suffix for name in names}
    for suffix, what in FILES.items():
        if suffix in suffixes:
            return f"a folder with {what}"
    return None
