"""What other programs save, and how to recognise it."""

from pathlib import Path

from checkpoint.save import FILE

# How others name what they save, and what it is.
FILES = {
    ".safetensors": "a safetensors file",
    ".pt": "a file of torch.save, such as nanoGPT's ckpt.pt",
    ".pth": "a file of torch.save",
    ".ckpt": "a file of torch.save",
    ".gguf": "a GGUF file",
    ".bin": "a file of torch.save, or of tokens",
}


FOLDERS = {
    "zero_to_fp32.py": "a checkpoint of DeepSpeed",
    "ckpt.pt": "a run of nanoGPT",
    ".metadata": "a checkpoint of torch.distributed.checkpoint",
}
FOLDERS |= {
    name: "a model of Hugging Face"
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
    )
}


def foreign(path: Path) -> str:
    """What others' files at `path` are, as the middle of a sentence; "" where nothing is known."""
    if path.is_file() and (FILE.fullmatch(path.name) or path.name == "index.json"):
        return f"is a part of the checkpoint {path.parent}"
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    known = [what for name, what in FOLDERS.items() if name in names]
    known += [f"a folder with {FILES[x]}" for x in FILES if any(Path(n).suffix == x for n in names)]
    what = FILES.get(path.suffix) if path.is_file() else next(iter(known), None)
    return f"is {what}, and others' weights are not read yet" if what else ""
