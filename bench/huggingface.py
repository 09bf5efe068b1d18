"""Hugging Face's GPT-2 checkpoints: a directory into :class:`bench.models.gpt.GPT`, and back.

    python bench/huggingface.py gpt2 folded --attention composed -R 4

loads ``gpt2/`` into reciprocal attention and writes what that computes to ``folded/``, which stock
code runs; each tensor keeps its dtype. Nothing is downloaded, and no tokenizer is touched. Needs
``safetensors``, but not ``transformers``; a ``pytorch_model.bin`` is read too, as tensors alone.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.models.gpt import GPT, CausalSelfAttention, GPTConfig
from ra_triton.nn import RACausalSelfAttention, from_gpt2, to_gpt2
from ra_triton.nn.attention import PARAMETRISATIONS

ATTENTIONS = ("plain", *PARAMETRISATIONS)
SIZES = {"n_positions": "block_size", "vocab_size": "vocab_size"}  # ours, by their names
SIZES |= {name: name for name in ("n_layer", "n_head", "n_embd")}
COMPUTES = {  # what bench.models.gpt computes; other values are another function
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
BODY, EMBEDDING, HEAD = "transformer.", "transformer.wte.weight", "lm_head.weight"
END_OF_TEXT = 50256  # of GPT-2's own vocabulary


def load_gpt2(
    directory: Path | str,
    attention: str = "free",
    *,
    R: int = 4,
    dropout: float = 0.0,
    backend: str = "auto",
) -> GPT:
    """A checkpoint of ``GPT2LMHeadModel`` or ``GPT2Model``, with reciprocal attention.

    Args:
        directory: with ``config.json`` and ``model.safetensors`` or its shards, or else
            ``pytorch_model.bin`` or its shards.
        attention: ``"free"`` or ``"composed"`` (see :class:`ra_triton.nn.RACausalSelfAttention`) or
            ``"plain"``; all compute what the checkpoint computes.
        R: reciprocal rank.
        dropout: probability, in training; the checkpoint's are not taken over.
        backend: of reciprocal attention.

    Returns:
        The model in float32, in ``eval()``.

    Raises:
        FileNotFoundError: no such directory, no config, no weights, a missing shard.
        ImportError: the weights are safetensors, and the package is not installed.
        ValueError: not a GPT-2; a GPT-2 that computes something else; names that are missing or
            left over, shapes that do not fit.
    """
    directory = Path(directory)
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    config = _read_config(directory)
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items()}
    gpt_config = GPTConfig(**sizes, dropout=dropout)
    state = _read_state(directory)
    if EMBEDDING in state:
        head = state.setdefault(HEAD, state[EMBEDDING])
        if not torch.equal(head, state[EMBEDDING]):
            raise ValueError(f"{directory}: {HEAD} is not tied to {EMBEDDING}")

    def make(config: GPTConfig) -> torch.nn.Module:
        options: dict[str, Any] = {"R": R, "parametrisation": attention, "backend": backend}
        return RACausalSelfAttention.from_config(config, **options)

    model = GPT(gpt_config, CausalSelfAttention if attention == "plain" else make)
    return from_gpt2(model, state, orientation="conv1d").eval()


def save_gpt2(
    model: GPT, directory: Path | str, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors``, which transformers loads as a GPT-2.

    Args:
        model: with any attention that folds into GPT-2.
        directory: made if missing; files of these names are overwritten.
        dtypes: of tensors by their names, as :func:`dtypes_of` reads them; the model's otherwise.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: an attention layer that no GPT-2 computes.
    """
    save_file = _safetensors().save_file
    state = to_gpt2(model, orientation="conv1d")
    del state[HEAD]  # tied: the embedding
    dtypes = dtypes or {}
    tensors = {
        name: t.to("cpu", dtypes.get(name, t.dtype)).contiguous() for name, t in state.items()
    }
    config = {theirs: getattr(model.config, ours) for theirs, ours in SIZES.items()}
    config |= {name: values[0] for name, values in COMPUTES.items()}
    end = END_OF_TEXT if config["vocab_size"] == END_OF_TEXT + 1 else None
    config |= {f"{name}_pdrop": model.config.dropout for name in ("attn", "embd", "resid")}
    config |= {"bos_token_id": end, "eos_token_id": end, "n_inner": None, "model_type": "gpt2"}
    config |= {"architectures": ["GPT2LMHeadModel"]}
    config["dtype"] = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def dtypes_of(directory: Path | str) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a checkpoint, by its name."""
    return {name: t.dtype for name, t in _read_state(Path(directory)).items()}


def _read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a GPT-2 that computes what :class:`GPT` computes."""
    config = json.loads(_existing(directory / "config.json").read_text())
    if config.get("model_type") != "gpt2":
        raise ValueError(f"{directory} must hold a gpt2, got {config.get('model_type')!r}")
    missing = sorted(SIZES.keys() - config.keys())
    if missing:
        raise ValueError(f"{directory / 'config.json'} lacks {', '.join(missing)}")
    wide = 4 * config["n_embd"]
    for name, values in {**COMPUTES, "n_inner": (None, wide)}.items():
        value = config.get(name, values[0])
        if value not in values:
            raise ValueError(f"{directory}: {name} must be {values[0]!r}, got {value!r}")
    return config


def _read_state(directory: Path) -> dict[str, Tensor]:
    """All tensors, by their names in a model with a head."""
    state = _read_files(directory)
    if not any(name.startswith(BODY) for name in state):  # saved without its head
        state = {BODY + name: t for name, t in state.items()}
    return state


def _read_files(directory: Path) -> dict[str, Tensor]:
    """All tensors, from one file or from the shards that an index names."""
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        "model.safetensors": lambda path: _safetensors().load_file(path),
        "pytorch_model.bin": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    }
    for name, read in readers.items():
        if (directory / name).is_file():
            return read(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            state: dict[str, Tensor] = {}
            for shard in shards:
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: a shard must lie beside it, got {shard!r}")
                state |= read(_existing(directory / shard))
            return state
    raise FileNotFoundError(f"{directory} has neither {' nor '.join(readers)}, nor their shards")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is needed: pip install safetensors") from error
    return safetensors.torch


def main(argv: list[str] | None = None) -> int:
    """Load one directory and write another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="directory of a Hugging Face GPT-2")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument("--attention", choices=ATTENTIONS, default="free")
    parser.add_argument("-R", type=int, default=4, help="reciprocal rank")
    args = parser.parse_args(argv)
    if args.target.exists() and args.target.resolve() == args.source.resolve():
        parser.error(f"target must be another directory than the source, got {args.target}")
    try:
        _safetensors()  # without it nothing could be written
        model = load_gpt2(args.source, args.attention, R=args.R)
        save_gpt2(model, args.target, dtypes_of(args.source))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.source} → {args.attention}, R={args.R}, {count:,} parameters → {args.target}")
    print("each tensor in its dtype of the source")
    return 0


if __name__ == "__main__":
    sys.exit(main())
