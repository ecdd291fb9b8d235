"""Text from a checkpoint.

    python sample.py RUN [--prompt="def "] [--tokens=300] [--temperature=0.8] [--top_k=50]
                         [--n=1] [--seed=0]
    [--device=cpu] [--tokenizer=gpt2]

RUN is a run's out_dir (its newest checkpoint) or one checkpoint's folder. The context is the last
block_size tokens. A run on shards without a known tokenizer reads and writes ids: --prompt="17 4
256". --tokenizer= replaces the run's own tokenizer.
"""

import argparse
import os
import sys

import torch

from checkpoint import load as checkpoint
from data import corpora
from data.tokenizer import Tokenizer, kept
from layers.generation import generate
from metrics.outlets import command
from model import GPT
from parallel.launch import pick_device
from run import build
from settings import parse
from settings.fields import update, with_traits


def load(
    path: str, device: str | torch.device = "cpu", tokenizer: str | None = None
) -> tuple[GPT, Tokenizer]:
    """The model of a run or checkpoint, in eval mode, and its tokenizer, or another one.

    Raises ValueError if there is none, or if the data that n-grams are counted in have changed.
    """
    saved = checkpoint.resolve(os.path.expanduser(path))
    cfg = with_traits(parse.from_dict(saved.tree("config")))
    cfg = update(cfg, tokenizer=kept(cfg.tokenizer, saved.path))
    model = GPT(build.model_config(cfg)).to(device)
    saved.load_weights(model)
    # No checkpoint holds the n-grams: they are counted again, which needs the same text.
    if cfg.ngram is not None:
        corpus = corpora.load(
            cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size, cfg.data_field
        )
        if corpus.sha256 != saved.tree("record/data_sha256"):
            raise ValueError(
                f"--ngram={cfg.ngram} counts the run's data, and {cfg.data} has changed since"
            )
        # The model has learned only what these counts do not say, so it needs them here too.
        build.add_ngrams(cfg, model, corpus.train)
    if tokenizer is not None:
        return model.eval(), Tokenizer(tokenizer)
    return model.eval(), corpora.tokenizer_of(cfg.data, cfg.tokenizer, cfg.vocab_size)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Raises ValueError: one sentence, as everywhere here, instead of a page of usage."""
        name = message.removeprefix("argument ").partition(":")[0]
        if "expected one argument" in message:
            raise ValueError(f"{name} has no value; type {name}=VALUE")
        raise ValueError(f"{message}; python sample.py --help lists what there is")


def main(argv: list[str]) -> None:
    parser = Parser(description="Text from a checkpoint.")
    parser.add_argument("run", help="a run's out_dir or a checkpoint's folder")
    parser.add_argument(
        "--prompt", help="what the text continues; default: a document's beginning, or a line break"
    )
    parser.add_argument("--tokens", type=int, default=300, help="how many to add")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_k", type=int, default=50, help="draw among this many; 0 = all")
    parser.add_argument("--n", type=int, default=1, help="how many samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokenizer", help="in place of the run's own")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.n < 1 or args.top_k < 0:
        raise ValueError("--tokens and --n are at least 1, --top_k at least 0")
    if args.temperature != 0 and not 1e-3 <= args.temperature <= 1e3:
        raise ValueError(
            f"--temperature={args.temperature} is not allowed; it is 0 or from 0.001 to 1000"
        )
    device = pick_device(args.device)
    model, tokenizer = load(args.run, device, args.tokenizer)
    # The model needs one token to begin with: what a document begins with, or a line break, or id 0
    # where there are only ids.
    text = args.prompt
    document_token = model.config.document_token
    if text is None and document_token is not None:
        text = ""
    elif text is None:
        text = "0" if tokenizer.name == "ids" else "\n"
    ids, n_unsaid = tokenizer.prompt(text, document_token)
    if not ids:
        raise ValueError(f"--prompt={args.prompt!r} has no tokens")
    prompt = torch.tensor(ids, device=device)
    for name in tokenizer.special:
        if name in text:
            print(f"sample.py: {name} in --prompt= is text, not one token", file=sys.stderr)
    prompts = prompt.repeat(args.n, 1)  # (n, T)
    # 0 means all tokens, which generate() takes as None.
    top_k = args.top_k or None
    ids = generate(model, prompts, args.tokens, args.temperature, top_k, args.seed)
    # print() would raise for a letter that the terminal's encoding lacks. It becomes a ? instead.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # A document token in front is nothing that the prompt said.
    for i, sample_ids in enumerate(ids[:, n_unsaid:].tolist()):
        if i > 0:
            print("-" * 40)
        # The byte 0, which ends a text of several, is nothing that a terminal shows.
        text = tokenizer.decode(sample_ids).replace("\0", "\n")
        print(text.encode(encoding, "replace").decode(encoding))


if __name__ == "__main__":
    command("sample.py", main)
