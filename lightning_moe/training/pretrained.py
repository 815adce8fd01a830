"""The configuration of a run that heals a released model: completed by what the model decides, and kept true."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lightning_moe.config.compose import Layer, find_config, load_layers
from lightning_moe.config.explain import place_of
from lightning_moe.config.request import DEFAULT_EXPERIMENT
from lightning_moe.data import TextDataModule, Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.hf.pretrained import KEY
from lightning_moe.module import LanguageModel
from lightning_moe.training.strategy import FullyShardedStrategy
from lightning_moe.user_paths import user_path

FILE, VOCABULARY = "data.tokenizer.file", "data.tokenizer.vocab_size"


def complete(config: Namespace, layers: Sequence[Layer], flags: Sequence[str]) -> None:
    """Set the tokenizer of a released model in a configuration, and make its paths absolute. Other runs stay as is.

    Args:
        config: complete configuration; changed in place.
        layers: configuration files, lowest first.
        flags: command-line arguments without ``--config``.

    Raises:
        UserError: a file or flag describes a decoder too, or the tokenizer cannot be used.
    """
    pretrained = config.model.pretrained
    if pretrained.path is None:
        return
    _refuse_decoder(config, layers, flags)
    for name in ("path", "thresholds"):
        if pretrained[name] is not None and (found := user_path(pretrained[name], f"{KEY}.{name}")).exists():
            pretrained[name] = str(found.resolve())
    own = config.data.tokenizer.file is None
    if own:
        config.data.tokenizer.file = pretrained.path
    size = _tokenizer(config.data.tokenizer.file, f"{KEY}.path" if own else FILE).vocab_size
    if VOCABULARY in _typed(flags) and config.data.tokenizer.vocab_size != size:
        raise UserError(
            f"{VOCABULARY}={config.data.tokenizer.vocab_size}: the tokenizer of {config.data.tokenizer.file} has "
            f"{size} tokens; leave it out"
        )
    config.data.tokenizer.vocab_size = config.model.decoder.vocab_size = size


def without_other_model(config: Namespace) -> None:
    """Remove what says nothing about the run: a decoder that is not made, or settings of a healing that is none."""
    if config.model.pretrained.path is None:
        del config.model["pretrained"]
    else:
        del config.model["decoder"]


def use_tokenizer(data: TextDataModule, model: LanguageModel) -> None:
    """Let the data of a healing be encoded by the tokenizer that `complete` found.

    Raises:
        UserError: it has ids that the model does not know.
    """
    file = data.tokenizer_config.file
    if model.healing is None or file is None:
        return
    own = file == model.healing.config.path
    data.adopt_tokenizer(_tokenizer(file, f"{KEY}.path" if own else FILE, model.decoder.vocab_size).to_text())


def check_trainer(trainer: Trainer, model: LanguageModel) -> None:
    """Refuse strategies and precisions that do not train a released model right.

    Raises:
        UserError: names the key.
    """
    if model.healing is None:
        return
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise UserError(
            "trainer.strategy=FullyShardedStrategy: a released model is not sharded; heal it with one process or with "
            "--config trainer/ddp, and model.pretrained.dtype=bfloat16 halves its memory"
        )
    if str(trainer.precision) not in ("32-true", "bf16-mixed"):
        raise UserError(
            f"trainer.precision={trainer.precision}: a released model is healed in 32-true or bf16-mixed, because what "
            "is trained stays fp32; model.pretrained.dtype=bfloat16 halves the memory of the rest"
        )


def _tokenizer(file: str, key: str, vocab_size: int | None = None) -> Tokenizer:
    try:
        from lightning_moe.hf.tokenizer import model_tokenizer

        return model_tokenizer(file, vocab_size, f"{key}:")
    except ImportError:
        raise UserError(f"{KEY}.path needs the transformers library: pip install -e '.[hf]' in a checkout") from None


def _refuse_decoder(config: Namespace, layers: Sequence[Layer], flags: Sequence[str]) -> None:
    """Refuse keys of a decoder, other than those of the experiment that every run starts from."""
    default = {str(layer.path) for layer in load_layers(find_config(DEFAULT_EXPERIMENT))}
    for name in vars(config.model.decoder):
        place = place_of(f"model.decoder.{name}", layers, flags)
        if place not in ("default", *default):
            raise UserError(
                f"model.decoder.{name} ({place}): describes a decoder that is made here, but {KEY}.path="
                f"{config.model.pretrained.path} is trained, which decides its sizes; leave one out ({KEY}."
                "num_experts_per_token sets its experts per token)"
            )


def _typed(flags: Sequence[str]) -> set[str]:
    return {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}
